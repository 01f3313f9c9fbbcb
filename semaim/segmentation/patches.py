"""The model of k-NN segmentation: a frozen encoder, without a head."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.model import BaseModel
from mmseg.registry import MODELS
from torch import Tensor


class FrozenPatches(BaseModel):
    """Patches of prepared images, by a frozen encoder.

    Args:
        backbone: config of `FrozenViT`.
        data_preprocessor: mmseg's, which normalises the images.
    """

    def __init__(self, backbone: Mapping[str, Any], data_preprocessor: Mapping[str, Any] | None = None):
        super().__init__(data_preprocessor=data_preprocessor)
        self.backbone = MODELS.build(dict(backbone))

    def forward(self, inputs: Tensor, data_samples: Sequence[Any] | None = None, mode: str = "tensor") -> Tensor:
        """Images (B, 3, H, W), normalised -> the map (B, D, rows, columns) of the last block."""
        return self.backbone(inputs)[-1]
