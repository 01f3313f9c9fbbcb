"""Networks: encoder, orders, targets, the two-stream model and MAE. Independent of runner, files and configs."""

from semaim.models.mae import MAE
from semaim.models.semaim import SemAIM
from semaim.models.targets import FeatureTarget, PixelTarget, Teacher
from semaim.models.vit import VisionTransformer

__all__ = ["MAE", "FeatureTarget", "PixelTarget", "SemAIM", "Teacher", "VisionTransformer"]
