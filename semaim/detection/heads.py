"""mmdet's heads with the rules of detectron2's ViTDet, and with boxes in fp32 even under autocast, as in detectron2.

bf16 has eight significant bits: between 512 and 1,024 pixels its numbers are 4 apart. mmdet makes anchors and moves
boxes in the dtype of the scores, and samples regions at boxes in the dtype of the maps.
"""

import torch
from mmdet.models import RPNHead, SingleRoIExtractor, StandardRoIHead
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor, nn

Boxes = list[InstanceData]  #: of each image


class PreciseRPNHead(RPNHead):
    """Proposals from fp32 logits, anchors and boxes; losses over a fixed number of anchors; arguments as mmdet's.

    Boxes are ranked by their logits: fp32 sigmoids tie, more often for confident networks (above 17 all are 1).
    """

    def predict_by_feat(self, cls_scores: list[Tensor], bbox_preds: list[Tensor], *args, **kwargs) -> Boxes:
        """As mmdet's, with the inputs cast to fp32."""
        with torch.autocast(cls_scores[0].device.type, enabled=False):
            scores, boxes = ([t.float() for t in maps] for maps in (cls_scores, bbox_preds))
            return super().predict_by_feat(scores, boxes, *args, **kwargs)

    def _predict_by_feat_single(
        self,
        cls_score_list: list[Tensor],
        bbox_pred_list: list[Tensor],
        score_factor_list: list,
        mlvl_priors: list[Tensor],
        img_meta: dict,
        cfg: ConfigDict | None = None,
        rescale: bool = False,
        with_nms: bool = True,
    ) -> InstanceData:
        """One image's maps per level -> proposals in its pixels, sorted by falling `scores`, which are logits."""
        cfg, boxes, logits, levels = cfg or self.test_cfg, [], [], []
        for level, (score, deltas, anchors) in enumerate(zip(cls_score_list, bbox_pred_list, mlvl_priors, strict=True)):
            # Stable, so that ties, of which bf16 has many, give the same order on every device.
            score, best = score.permute(1, 2, 0).flatten().sort(descending=True, stable=True)
            score, best = score[: cfg.nms_pre], best[: cfg.nms_pre]
            deltas = deltas.permute(1, 2, 0).reshape(-1, 4)[best]
            boxes.append(self.bbox_coder.decode(anchors[best], deltas, max_shape=img_meta["img_shape"]))
            logits.append(score)
            levels.append(torch.full_like(best, level))
        found = InstanceData(bboxes=torch.cat(boxes), scores=torch.cat(logits), level_ids=torch.cat(levels))
        return self._bbox_post_process(found, cfg, rescale, with_nms, img_meta)

    def get_targets(self, anchor_list: list, valid_flag_list: list, batch_gt_instances: list, *args, **kwargs) -> tuple:
        """As mmdet's, but all losses are divided by the largest possible number of sampled anchors, 256 per image.

        mmdet divides by the number actually sampled, counting one positive anchor more for an image without any.
        """
        targets = super().get_targets(anchor_list, valid_flag_list, batch_gt_instances, *args, **kwargs)
        return *targets[:4], self.sampler.num * len(anchor_list), *targets[5:]


class PreciseRoIExtractor(SingleRoIExtractor):
    """Regions sampled in fp32, the dtype of the boxes and of the operator; arguments as mmdet's."""

    def forward(self, feats: tuple[Tensor, ...], rois: Tensor, roi_scale_factor: float | None = None) -> Tensor:
        """Maps (B, C, H, W) per level, boxes (N, 5) with the image's index first -> (N, C, h, w)."""
        dtype = torch.promote_types(feats[0].dtype, torch.float32)
        return super().forward(tuple(maps.to(dtype) for maps in feats), rois.to(dtype), roi_scale_factor)


class PreciseSyncBN(nn.SyncBatchNorm):
    """SyncBN that exchanges fp32: a process without boxes sends the dtype of its maps, which has to match."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) -> the same shape and dtype."""
        return super().forward(x.float()).to(x.dtype)


class ViTDetRoIHead(StandardRoIHead):
    """mmdet's head, trained with the objects among the proposals, without empty boxes; arguments as mmdet's.

    The objects' boxes are matched like all proposals. The sampler must not add them itself: mmdet's puts them first,
    each matched with itself, which is a different object if two have the same box.
    """

    def loss(self, x: tuple[Tensor, ...], rpn_results_list: Boxes, batch_data_samples: list[DetDataSample]) -> dict:
        """Losses of boxes and masks, by name."""
        return super().loss(x, with_objects(rpn_results_list, batch_data_samples), batch_data_samples)

    def predict_bbox(self, *args, **kwargs) -> Boxes:
        """Boxes, scores and labels of every image."""
        return [found[nonempty(found.bboxes)] for found in super().predict_bbox(*args, **kwargs)]


def with_objects(proposals: Boxes, samples: list[DetDataSample]) -> Boxes:
    """The proposals of every image, followed by the boxes of its objects."""
    return [
        InstanceData(bboxes=torch.cat([found.bboxes, sample.gt_instances.bboxes]))
        for found, sample in zip(proposals, samples, strict=True)
    ]


def nonempty(boxes: Tensor) -> Tensor:
    """Which boxes (N, 4) have an area: (N,) bool."""
    return (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
