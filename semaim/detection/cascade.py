"""Cascade R-CNN as in ViTDet: three box heads in sequence, and one mask head."""

import torch
from mmdet.models import BBoxHead
from mmdet.models.task_modules import SamplingResult
from mmdet.models.utils import unpack_gt_instances
from mmdet.registry import MODELS, TASK_UTILS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox2roi
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor, nn

from semaim.detection.heads import Boxes, ViTDetRoIHead, nonempty, with_objects


class ViTDetCascade(ViTDetRoIHead):
    """Box heads that refine the boxes in sequence, each matched more strictly than the one before.

    Proposals are sampled once, for the first stage; all of its refined boxes are the input of the next stage.
    The losses of all stages have equal weights, and each stage passes 1 / stages of its gradient to the maps. Scores
    are the mean of the stages' softmaxes, boxes are the last stage's. The mask head is trained on the first stage's
    proposals and runs on the final boxes.

    mmdet's head samples again in every stage, weights the losses by 1, 0.5, 0.25 and not the gradient, averages logits,
    and has a mask head for each stage.

    Args:
        stages: per stage, the overlap from which a box matches an object (`iou`) and the `stds` of its deltas.
        bbox_head: config of all stages, one box for all classes; its `stds` are replaced by the stage's.
        **parts: arguments of mmdet's `StandardRoIHead`; the sampler must not add the objects itself.

    Source: detectron2's modeling/roi_heads/cascade_rcnn.py, as projects/ViTDet configures it.
    """

    def __init__(self, stages: list[dict], **parts):
        self.stages = stages
        super().__init__(**parts)

    def init_bbox_head(self, bbox_roi_extractor: dict, bbox_head: dict) -> None:
        """Build one box head per stage."""
        self.bbox_roi_extractor, self.bbox_head = MODELS.build(bbox_roi_extractor), nn.ModuleList()
        for stage in self.stages:
            coder = dict(bbox_head["bbox_coder"], stds=stage["stds"])
            self.bbox_head.append(MODELS.build(dict(bbox_head, bbox_coder=coder, reg_class_agnostic=True)))

    def head_of(self, stage: int) -> BBoxHead:
        """The box head of a stage."""
        return self.bbox_head[stage]

    def init_assigner_sampler(self) -> None:
        """Build one assigner per stage, and the sampler of the first stage."""
        if self.train_cfg is not None:
            assigners = [dict(self.train_cfg.assigner) for _ in self.stages]
            for assigner, stage in zip(assigners, self.stages, strict=True):
                assigner.update(pos_iou_thr=stage["iou"], neg_iou_thr=stage["iou"], min_pos_iou=stage["iou"])
            self.bbox_assigners = [TASK_UTILS.build(assigner) for assigner in assigners]
            self.bbox_sampler = TASK_UTILS.build(self.train_cfg.sampler, default_args={"context": self})

    def run(self, stage: int, x: tuple[Tensor, ...], rois: Tensor) -> tuple[Tensor, Tensor]:
        """Maps and boxes (N, 5) with the image's index first -> a stage's logits (N, classes + 1) and deltas (N, 4)."""
        pooled = self.bbox_roi_extractor(x[: self.bbox_roi_extractor.num_inputs], rois)
        if pooled.requires_grad:
            pooled.register_hook(lambda gradient: gradient / len(self.stages))
        return self.head_of(stage)(pooled)

    def move(self, stage: int, boxes: list[Tensor], deltas: Tensor, metas: list[dict]) -> list[Tensor]:
        """Each image's boxes (N, 4), moved by a stage's deltas (of all images, (N, 4)) and clipped to the image."""
        parts = deltas.detach().split([len(part) for part in boxes])
        decode = self.head_of(stage).bbox_coder.decode
        return [
            decode(part, moves, max_shape=meta["img_shape"])
            for part, moves, meta in zip(boxes, parts, metas, strict=True)
        ]

    # Training

    def sample(self, proposals: InstanceData, objects: InstanceData) -> SamplingResult:
        """The proposals of an image that the first stage and the mask head are trained on."""
        proposals = InstanceData(priors=proposals.bboxes)
        return self.bbox_sampler.sample(self.bbox_assigners[0].assign(proposals, objects), proposals, objects)

    def targets(self, stage: int, boxes: Tensor, objects: InstanceData) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For boxes (N, 4): labels (N,), the last for background, their weights, deltas (N, 4), their weights."""
        head = self.head_of(stage)
        index = self.bbox_assigners[stage].assign(InstanceData(priors=boxes), objects).gt_inds - 1
        found = index >= 0
        labels, deltas = torch.full_like(index, head.num_classes), torch.zeros_like(boxes)
        labels[found] = objects.labels[index[found]]
        deltas[found] = head.bbox_coder.encode(boxes[found], objects.bboxes[index[found]])
        return labels, boxes.new_ones(len(boxes)), deltas, found[:, None].to(boxes).expand_as(boxes)

    def loss(self, x: tuple[Tensor, ...], rpn_results_list: Boxes, batch_data_samples: list[DetDataSample]) -> dict:
        """Losses of every stage's boxes (`s0.loss_cls`, `s0.loss_bbox`, ...), and `loss_mask` with a mask head."""
        images, _, metas = unpack_gt_instances(batch_data_samples)
        proposals = with_objects(rpn_results_list, batch_data_samples)
        sampled = [self.sample(found, objects) for found, objects in zip(proposals, images, strict=True)]
        boxes = [result.priors for result in sampled]
        losses: dict[str, Tensor] = {}
        for stage in range(len(self.stages)):
            rois = bbox2roi(boxes)
            logits, deltas = self.run(stage, x, rois)
            targets = [self.targets(stage, part, objects) for part, objects in zip(boxes, images, strict=True)]
            matched = (torch.cat(parts) for parts in zip(*targets, strict=True))
            found = self.head_of(stage).loss(logits, deltas, rois, *matched)
            losses |= {f"s{stage}.{name}": value for name, value in found.items()}
            boxes = [part[nonempty(part)] for part in self.move(stage, boxes, deltas, metas)]
        return losses | (self.mask_loss(x, sampled, None, images)["loss_mask"] if self.with_mask else {})

    # Testing

    def predict_bbox(
        self,
        x: tuple[Tensor, ...],
        batch_img_metas: list[dict],
        rpn_results_list: Boxes,
        rcnn_test_cfg: ConfigDict,
        rescale: bool = False,
    ) -> Boxes:
        """Boxes, scores and labels of every image; no box is removed between the stages."""
        moved, probabilities = [found.bboxes for found in rpn_results_list], []
        for stage in range(len(self.stages)):
            boxes, rois = moved, bbox2roi(moved)
            logits, deltas = self.run(stage, x, rois)
            probabilities.append(logits.softmax(-1))
            moved = self.move(stage, boxes, deltas, batch_img_metas)
        counts = [len(part) for part in boxes]
        # The head applies a softmax; that of the logarithms of probabilities is the probabilities.
        parts = (t.split(counts) for t in (rois, torch.stack(probabilities).mean(0).log(), deltas))
        results = self.head_of(-1).predict_by_feat(
            *parts, batch_img_metas=batch_img_metas, rcnn_test_cfg=rcnn_test_cfg, rescale=rescale
        )
        return [found[nonempty(found.bboxes)] for found in results]
