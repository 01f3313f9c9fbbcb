"""The method: encoder, orders, targets and the two-stream model. Knows no runner, no file and no config."""

from semaim.models.semaim import SemAIM
from semaim.models.targets import FeatureTarget, PixelTarget, Teacher
from semaim.models.vit import VisionTransformer

__all__ = ["FeatureTarget", "PixelTarget", "SemAIM", "Teacher", "VisionTransformer"]
