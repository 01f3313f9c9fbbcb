"""What is predicted for each patch, the loss of a prediction, and the teacher as guide.

A target has `width` (values per patch), `prepare(images, tokens) -> (B, L, width)` and
`loss(prediction, target) -> (B, L)`. `tokens` are those of the guide, the network whose unmasked pass also gives the
order: the model itself, its running average (EMA), or a teacher.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from semaim.models.vit import patchify


def gaussian_kernel(size: int, sigma: float) -> Tensor:
    """1-D Gaussian that sums to 1: (size,). The 2-D one is its product with itself."""
    offset = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    line = torch.exp(-(offset**2) / (2 * sigma**2))
    return (line / line.sum()).float()


def filter_matrix(kernel: Tensor, side: int) -> Tensor:
    """The (side, side) matrix that filters one axis of an image with a kernel (size,), zeros outside of the image."""
    place = torch.arange(side, device=kernel.device)
    offset = place - place[:, None] + len(kernel) // 2
    inside = (offset >= 0) & (offset < len(kernel))
    return torch.where(inside, kernel[offset.clamp(0, len(kernel) - 1)], kernel.new_zeros(()))


class PixelTarget(nn.Module):
    """The pixels of each patch, blurred, normalised to mean 0 and variance 1 per patch.

    Args:
        patch_size: (height, width) in pixels.
        in_chans: image channels.
        blur_kernel: side of the Gaussian in pixels, odd; 0 for none.
        blur_sigma: its standard deviation in pixels.
        norm_pix: normalise every patch by its own mean and (unbiased) variance.
        loss: "l2" (squared) or "l1" (absolute) difference, mean over a patch's values.

    Source: official code, `forward_pixel_loss`; zero padding at the border of the blur.
    """

    kernel: Tensor | None  #: the blur of one axis, (blur_kernel,)

    def __init__(
        self,
        patch_size: tuple[int, int],
        in_chans: int = 3,
        blur_kernel: int = 9,
        blur_sigma: float = 1.0,
        norm_pix: bool = True,
        loss: str = "l2",
    ):
        super().__init__()
        if loss not in ("l1", "l2"):
            raise ValueError(f"unknown pixel loss {loss!r}: choose l1 or l2")
        if blur_kernel and blur_kernel % 2 == 0:
            raise ValueError(f"blur_kernel {blur_kernel} has no middle: give an odd number, or 0 for no blur")
        self.patch_size, self.in_chans = patch_size, in_chans
        self.norm_pix, self.difference = norm_pix, F.l1_loss if loss == "l1" else F.mse_loss
        self.width = patch_size[0] * patch_size[1] * in_chans
        kernel = gaussian_kernel(blur_kernel, blur_sigma) if blur_kernel else None
        self.register_buffer("kernel", kernel, persistent=False)

    def patches(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> blurred patches (B, L, width), not normalised.

        The blur is two matrix products, one an axis: on a CPU a third of the time of the 2-D filter on each channel.
        """
        if self.kernel is not None:
            rows, columns = (filter_matrix(self.kernel, side) for side in images.shape[-2:])
            images = rows @ (images @ columns.T)
        return patchify(images, self.patch_size)

    def prepare(self, images: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W), normalised -> target (B, L, width) in full precision; `tokens` are not used."""
        with torch.autocast(images.device.type, enabled=False):
            patches = self.patches(images)
            if not self.norm_pix:
                return patches
            variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
            return (patches - mean) / (variance + 1e-6).sqrt()

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Difference (B, L), mean over each patch's values."""
        return self.difference(prediction.to(target.dtype), target, reduction="none").mean(dim=-1)


class FeatureTarget(nn.Module):
    """The guide's own token of each patch; squared distance of unit vectors, 2 - 2 cos.

    Args:
        width: channels of the guide's tokens; None where the guide is as wide as the model.

    Source: official code, `forward_feature_loss`.
    """

    def __init__(self, width: int | None = None):
        super().__init__()
        self.width = width

    def prepare(self, images: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Guide tokens (B, 1 + L, width) -> unit vectors of the patches (B, L, width)."""
        if tokens is None:
            raise ValueError("a target of features needs the guide's tokens")
        return F.normalize(tokens[:, 1:].to(images.dtype), dim=-1)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Squared distance (B, L), summed over channels."""
        return (F.normalize(prediction.to(target.dtype), dim=-1) - target).square().sum(dim=-1)


def ema_decay(epoch: int) -> float:
    """Decay of the running average in a 0-based epoch: from 0.999 linearly to 0.9999 over 100 epochs, then constant."""
    return 0.999 + min(epoch, 100) / 100 * 0.0009


class Teacher:
    """A frozen timm model as guide: one pass gives the tokens for the order and for the target.

    Not a Module, so it is not trained, not wrapped for distributed training, and not saved with the student.

    Args:
        network: a timm ViT with a class token, built with `dynamic_img_size=True`.
        project: pass the tokens through the network's head too (CLIP's projection to the shared space), in full
            precision under autocast too.
        mean: of the three channels of pixels from 0 to 1, by which the student's images are normalised.
        std: the same.
        normalisation: of the teacher's images. "teacher": as in its own training, by the mean and std of its
            `pretrained_cfg`. "student": as the student's, which is what the official code feeds CLIP.
    """

    def __init__(
        self,
        network: Any,
        project: bool = False,
        mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
        normalisation: str = "teacher",
    ):
        if not getattr(network, "has_class_token", False) or not hasattr(network, "patch_embed"):
            raise ValueError(f"{type(network).__name__} cannot be a teacher: it needs patches and a class token")
        if project and not hasattr(network.head, "out_features"):
            raise ValueError(f"{type(network).__name__} has no projection: leave project off")
        if normalisation not in ("teacher", "student"):
            raise ValueError(f"unknown normalisation {normalisation!r}: choose teacher or student")
        self.network = network.eval().requires_grad_(False)
        self.project = project
        cfg = getattr(network, "pretrained_cfg", {}) if normalisation == "teacher" else {}
        own_mean, own_std = torch.tensor(cfg.get("mean", mean)), torch.tensor(cfg.get("std", std))
        # ((x * std + mean) - own_mean) / own_std, as one scale and one shift
        self.scale = (torch.tensor(std) / own_std).view(3, 1, 1)
        self.shift = ((torch.tensor(mean) - own_mean) / own_std).view(3, 1, 1)
        self.width = network.head.out_features if project else network.embed_dim

    @torch.no_grad()
    def __call__(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Images (B, 3, H, W), normalised for the student -> tokens (B, 1 + L, width) on the student's grid.

        Images are resized first if the teacher's patch size differs, so that both have the same grid.
        """
        if self.scale.device != images.device:
            self.network.to(images.device)
            self.scale, self.shift = self.scale.to(images.device), self.shift.to(images.device)
        size = tuple(n * p for n, p in zip(grid, self.network.patch_embed.patch_size, strict=True))
        if size != tuple(images.shape[-2:]):
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True)
        tokens = self.network.forward_features(images * self.scale + self.shift)
        patches = tokens[:, self.network.num_prefix_tokens :]  # register tokens, if any, come between
        tokens = torch.cat([tokens[:, :1], patches], dim=1)
        if not self.project:
            return tokens
        with torch.autocast(images.device.type, enabled=False):  # the maximum of its similarity is used
            return self.network.head(tokens.to(self.network.head.weight.dtype))
