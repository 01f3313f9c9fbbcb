"""Shared by all our models under mmengine's runner: precision, normalisation on the device."""

import torch
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.registry import MODELS
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from semaim.engine.precision import autocast, check_precision, computed_in


@MODELS.register_module()
class NormaliseImages(BaseDataPreprocessor):
    """Moves a batch to the device and normalises its uint8 images there, for a quarter of the traffic of floats.

    Args:
        mean, std: of the three channels of pixels from 0 to 1.
    """

    def __init__(self, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD):
        super().__init__(non_blocking=True)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1) * 255, persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float (B, 3, H, W), normalised."""
        return (images.float() - self.mean) / self.std

    def denormalise(self, images: Tensor) -> Tensor:
        """Inverse of `normalise`, as floats in [0, 1]."""
        return ((images * self.std + self.mean) / 255).clamp(0, 1)

    def forward(self, data: dict, training: bool = False) -> dict:
        """dict of image uint8 (B, 3, H, W) and draw (B, L) -> dict of images, normalised, and draw, on the device."""
        data = self.cast_data(data)
        return {"images": self.normalise(data["image"]), "draw": data["draw"]}


class NetworkModel(BaseModel):
    """A network as mmengine trains it. Checkpoints hold the state of `network`, so its parameter names have no prefix.

    Args:
        network: what is trained.
        precision: on a GPU, "bf16" (by autocast) or "fp32".
        cpu_precision: the same on a CPU; "bf16" only where the processor has instructions for it.
        data_preprocessor: config of what moves a batch to the device.
    """

    def __init__(
        self,
        network: nn.Module,
        precision: str = "bf16",
        data_preprocessor: dict | None = None,
        cpu_precision: str = "fp32",
    ):
        super().__init__(data_preprocessor=data_preprocessor)
        check_precision("model", precision, cpu_precision)
        self.network = network
        self.precision, self.cpu_precision = precision, cpu_precision

    def init_weights(self) -> None:
        """The network initialises itself when it is built."""

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context of a forward pass."""
        return autocast(device, self.computed_in(device))

    def computed_in(self, device: torch.device | str) -> str:
        """ "bf16" or "fp32": what a forward pass on this device computes in."""
        return computed_in(device, self.precision, self.cpu_precision)
