"""Matching boxes to objects and applying deltas to boxes, with detectron2's rules where mmdet's differ."""

import math

import torch
from mmdet.models.task_modules import AssignResult, DeltaXYWHBBoxCoder, MaxIoUAssigner
from torch import Tensor


class BestOverlapAssigner(MaxIoUAssigner):
    """Match anchors to objects by overlap; the best anchors of every object are positive, however small the overlap.

    A positive anchor belongs to the object that *it* overlaps most, even if it is the best anchor of another object.
    An object that overlaps no anchor gets none. In mmdet an anchor that is the best of several objects belongs to the
    last of them, and an object whose best overlap is below `min_pos_iou` gets no best anchor: under large-scale jitter
    every seventh object.

    Args:
        pos_iou_thr, neg_iou_thr: an anchor is positive from the first overlap on, negative below the second, else
            ignored.

    Source: detectron2's modeling/matcher.py, `allow_low_quality_matches`. There, for an object that overlaps no
    anchor, all anchors are positive, as all have its best overlap of 0.
    """

    def __init__(self, pos_iou_thr: float, neg_iou_thr: float):
        super().__init__(pos_iou_thr, neg_iou_thr)

    def assign_wrt_overlaps(self, overlaps: Tensor, gt_labels: Tensor) -> AssignResult:
        """Overlaps (objects, boxes), labels (objects,) -> each box's object + 1, 0 for background, -1 for ignored."""
        if not overlaps.numel():
            return super().assign_wrt_overlaps(overlaps, gt_labels)
        best, which = overlaps.max(dim=0)
        best_of_object = (overlaps == overlaps.amax(dim=1, keepdim=True)) & (overlaps > 0)
        positive = (best >= self.pos_iou_thr) | best_of_object.any(dim=0)
        found = torch.where(best < self.neg_iou_thr, 0, -1).where(~positive, which + 1)
        labels = gt_labels[which].where(positive, -1)
        return AssignResult(len(overlaps), found, best, labels)


class BoxCoder(DeltaXYWHBBoxCoder):
    """Deltas applied to boxes in fp32, whatever the dtype of the network; only growth is limited.

    mmdet applies them in their own dtype, in which 0.1 may be 0.1001 (bf16), and limits how far a box shrinks, too.

    Args:
        stds: of the deltas (x, y, width, height), by which they are divided; the inverses of detectron2's weights.

    Source: detectron2's modeling/box_regression.py.
    """

    def __init__(self, stds: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)):
        super().__init__(target_means=(0.0, 0.0, 0.0, 0.0), target_stds=tuple(stds))

    def decode(
        self,
        bboxes: Tensor,
        pred_bboxes: Tensor,
        max_shape: tuple[int, int] | None = None,
        wh_ratio_clip: float = 16 / 1000,
    ) -> Tensor:
        """Boxes (N, 4), deltas (N, classes * 4) -> boxes (N, classes * 4), clipped to `max_shape` (height, width)."""
        boxes, weights = bboxes.float()[:, None], bboxes.new_tensor([1 / std for std in self.stds], dtype=torch.float32)
        moves = pred_bboxes.float().unflatten(1, (-1, 4)) / weights
        sizes = boxes[..., 2:] - boxes[..., :2]
        centres = boxes[..., :2] + 0.5 * sizes + moves[..., :2] * sizes
        sizes = sizes * moves[..., 2:].clamp(max=-math.log(wh_ratio_clip)).exp()
        moved = torch.stack([centres - 0.5 * sizes, centres + 0.5 * sizes], dim=-2)  # (N, classes, corner, axis)
        if max_shape is not None:
            moved = moved.clamp(min=0).minimum(moved.new_tensor(max_shape[1::-1]))
        return moved.flatten(1)
