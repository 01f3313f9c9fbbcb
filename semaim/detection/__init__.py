"""Our part in mmdet: importing this registers ViTDet's backbone, necks, heads, norm and metric in its registries."""

from semaim import compat

compat.install()  # before mmdet, which imports mmcv's operators

import mmdet.datasets  # noqa: E402, F401  registers what configs name
import mmdet.evaluation  # noqa: E402, F401
import mmdet.models  # noqa: E402, F401
from mmdet.registry import METRICS, MODELS  # noqa: E402
from timm.layers import LayerNorm2d  # noqa: E402

from semaim.detection.heads import PreciseRoIExtractor, PreciseRPNHead, PreciseSyncBN  # noqa: E402
from semaim.detection.metrics import FasterCocoMetric  # noqa: E402
from semaim.models.vitdet import MapScales, SimpleFeaturePyramid, ViTDet  # noqa: E402

MODELS.register_module(module=ViTDet)
MODELS.register_module(module=SimpleFeaturePyramid)
MODELS.register_module(module=MapScales)
MODELS.register_module(module=PreciseRPNHead)
MODELS.register_module(module=PreciseRoIExtractor)
MODELS.register_module(module=PreciseSyncBN)
METRICS.register_module(module=FasterCocoMetric)
MODELS.register_module(name="LN2d", module=LayerNorm2d)


def foreign_names(state: dict) -> None:
    """A whole detector's weights under our names; None, as no file of other names is known."""
