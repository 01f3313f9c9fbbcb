"""mmdet's heads with boxes in fp32 under autocast too; detectron2 decodes its proposals so.

bf16 has eight bits: between 512 and 1,024 pixels its numbers are 4 apart. mmdet makes anchors and moves boxes in the
type of the scores, and samples regions at boxes of the type of the maps.
"""

import torch
from mmdet.models import RPNHead, SingleRoIExtractor
from torch import Tensor, nn


class PreciseRPNHead(RPNHead):
    """Proposals from fp32 scores, anchors and boxes; arguments as mmdet's."""

    def predict_by_feat(self, cls_scores: list[Tensor], bbox_preds: list[Tensor], *args, **kwargs) -> list:
        """As mmdet's, of the same numbers in fp32."""
        with torch.autocast(cls_scores[0].device.type, enabled=False):
            scores, boxes = ([t.float() for t in maps] for maps in (cls_scores, bbox_preds))
            return super().predict_by_feat(scores, boxes, *args, **kwargs)


class PreciseRoIExtractor(SingleRoIExtractor):
    """Regions sampled in fp32, where the boxes are and the operator computes anyway; arguments as mmdet's."""

    def forward(self, feats: tuple[Tensor, ...], rois: Tensor, roi_scale_factor: float | None = None) -> Tensor:
        """Maps (B, C, H, W) per level, boxes (N, 5) with the image's index first -> (N, C, h, w)."""
        return super().forward(tuple(maps.float() for maps in feats), rois.float(), roi_scale_factor)


class PreciseSyncBN(nn.SyncBatchNorm):
    """SyncBN whose processes exchange fp32: where one has no boxes torch sends the type of its maps, which must fit."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) -> the same, in its type."""
        return super().forward(x.float()).to(x.dtype)
