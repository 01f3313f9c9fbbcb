"""ViTDet as configs name it: with mm's `init_cfg`."""

from semaim.checkpoints.init_cfg import InitFromCheckpoint
from semaim.models.vitdet import ViTDet


class ViTDetBackbone(InitFromCheckpoint, ViTDet):
    """`ViTDet`, which also takes `init_cfg`; see `InitFromCheckpoint`."""

    scope = "mmdet"
