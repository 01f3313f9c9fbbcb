"""Extensions of mmdet: importing this package registers what the ViTDet configs name."""

from semaim import compat

compat.install()  # before mmdet, which imports mmcv's operators

import mmdet.datasets  # noqa: E402, F401  registers what configs name
import mmdet.evaluation  # noqa: E402, F401
import mmdet.models  # noqa: E402, F401
from mmdet.registry import DATASETS, METRICS, MODELS, TASK_UTILS, TRANSFORMS  # noqa: E402
from timm.layers import LayerNorm2d  # noqa: E402

from semaim.detection import annotations  # noqa: E402
from semaim.detection.backbone import ViTDetBackbone  # noqa: E402
from semaim.detection.cascade import ViTDetCascade  # noqa: E402
from semaim.detection.heads import PreciseRoIExtractor, PreciseRPNHead, PreciseSyncBN, ViTDetRoIHead  # noqa: E402
from semaim.detection.initial import ViTDetBoxHead, ViTDetMaskHead  # noqa: E402
from semaim.detection.matching import BestOverlapAssigner, BoxCoder  # noqa: E402
from semaim.detection.metrics import FasterCocoMetric, PartCocoMetric, PartFasterCocoMetric  # noqa: E402
from semaim.detection.own_coco import PartOfCoco  # noqa: E402
from semaim.detection.padding import SquarePadding  # noqa: E402
from semaim.detection.released import foreign_weights  # noqa: E402
from semaim.detection.transforms import FixedSizeCrop, PillowResize, ResizeScale  # noqa: E402
from semaim.encoders.networks import PlainViTDet  # noqa: E402
from semaim.models.vitdet import MapScales, SimpleFeaturePyramid  # noqa: E402

__all__ = ["foreign_weights"]

annotations.install()

MODELS.register_module(module=SquarePadding)
MODELS.register_module(name="ViTDet", module=ViTDetBackbone)
MODELS.register_module(module=PlainViTDet)
MODELS.register_module(module=SimpleFeaturePyramid)
MODELS.register_module(module=MapScales)
MODELS.register_module(module=PreciseRPNHead)
MODELS.register_module(module=PreciseRoIExtractor)
MODELS.register_module(module=PreciseSyncBN)
MODELS.register_module(module=ViTDetRoIHead)
MODELS.register_module(module=ViTDetCascade)
MODELS.register_module(module=ViTDetBoxHead)
MODELS.register_module(module=ViTDetMaskHead)
TASK_UTILS.register_module(module=BestOverlapAssigner)
TASK_UTILS.register_module(module=BoxCoder)
DATASETS.register_module(module=PartOfCoco)
for _metric in (FasterCocoMetric, PartCocoMetric, PartFasterCocoMetric):
    METRICS.register_module(module=_metric)
TRANSFORMS.register_module(module=PillowResize)
TRANSFORMS.register_module(module=ResizeScale)
TRANSFORMS.register_module(module=FixedSizeCrop)
MODELS.register_module(name="LN2d", module=LayerNorm2d)
