"""The segmentation encoder as configs name it: with mm's `init_cfg`."""

from semaim.checkpoints.init_cfg import InitFromCheckpoint
from semaim.models.segvit import SegmentationViT


class SegmentationBackbone(InitFromCheckpoint, SegmentationViT):
    """`SegmentationViT`, which also takes `init_cfg`; see `InitFromCheckpoint`."""

    scope = "mmseg"
