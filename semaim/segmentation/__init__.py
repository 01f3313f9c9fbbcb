"""Extensions of mmseg: importing this package registers encoders, the linear head and the metric."""

from semaim import compat

compat.install()  # before mmseg, which imports mmcv's operators

import mmseg.datasets  # noqa: E402, F401  registers what configs name
import mmseg.evaluation  # noqa: E402, F401
import mmseg.models  # noqa: E402, F401
from mmseg.registry import DATASETS, METRICS, MODELS  # noqa: E402

from semaim.encoders.networks import FrozenViT, PlainSegmentationViT  # noqa: E402
from semaim.segmentation.backbone import SegmentationBackbone  # noqa: E402
from semaim.segmentation.heads import LinearHead  # noqa: E402
from semaim.segmentation.metrics import CountedIoUMetric  # noqa: E402
from semaim.segmentation.mmseg_names import foreign_weights  # noqa: E402
from semaim.segmentation.own_maps import OwnLabelMaps  # noqa: E402
from semaim.segmentation.patches import FrozenPatches  # noqa: E402

__all__ = ["foreign_weights"]

DATASETS.register_module(module=OwnLabelMaps)
METRICS.register_module(module=CountedIoUMetric)
MODELS.register_module(name="SegmentationViT", module=SegmentationBackbone)
for _model in (PlainSegmentationViT, FrozenViT, LinearHead, FrozenPatches):
    MODELS.register_module(module=_model)
