"""Our part in mmdet: importing this registers in its registries what ViTDet's configs name."""

from semaim import compat

compat.install()  # before mmdet, which imports mmcv's operators

import mmdet.datasets  # noqa: E402, F401  registers what configs name
import mmdet.evaluation  # noqa: E402, F401
import mmdet.models  # noqa: E402, F401
from mmdet.registry import METRICS, MODELS, TASK_UTILS  # noqa: E402
from timm.layers import LayerNorm2d  # noqa: E402

from semaim.detection.cascade import ViTDetCascade  # noqa: E402
from semaim.detection.heads import PreciseRoIExtractor, PreciseRPNHead, PreciseSyncBN, ViTDetRoIHead  # noqa: E402
from semaim.detection.matching import BestOverlapAssigner, BoxCoder  # noqa: E402
from semaim.detection.metrics import FasterCocoMetric  # noqa: E402
from semaim.detection.padding import SquarePadding  # noqa: E402
from semaim.models.vitdet import MapScales, SimpleFeaturePyramid, ViTDet  # noqa: E402

MODELS.register_module(module=SquarePadding)
MODELS.register_module(module=ViTDet)
MODELS.register_module(module=SimpleFeaturePyramid)
MODELS.register_module(module=MapScales)
MODELS.register_module(module=PreciseRPNHead)
MODELS.register_module(module=PreciseRoIExtractor)
MODELS.register_module(module=PreciseSyncBN)
MODELS.register_module(module=ViTDetRoIHead)
MODELS.register_module(module=ViTDetCascade)
TASK_UTILS.register_module(module=BestOverlapAssigner)
TASK_UTILS.register_module(module=BoxCoder)
METRICS.register_module(module=FasterCocoMetric)
MODELS.register_module(name="LN2d", module=LayerNorm2d)


def foreign_names(state: dict) -> None:
    """A whole detector's weights under our names; None, as no file of other names is known."""
