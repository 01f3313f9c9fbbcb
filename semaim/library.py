"""The public library: checkpoints, encoders and orders for use outside the suite's own commands.

Shapes: B images, L patches, D channels; tokens are (B, prefix + L, D), the class token first.
"""

import os
from typing import Any

import torch
from torch import Tensor

from semaim import checkpoints
from semaim.checkpoints.consumers import buildable
from semaim.checkpoints.normalisation import Statistics
from semaim.errors import UserError
from semaim.models.ordering import check_order, make_order, similarity_map
from semaim.models.vit import VisionTransformer

#: What patches are compared with: class token, mean of the patches, or the last block's attention of the class token.
SIMILARITIES = ("cls", "gap", "self")


class Encoder(VisionTransformer):
    """A pretrained plain ViT: images (B, 3, H, W), normalised -> tokens after the final norm (B, 1 + L, D).

    H and W are any multiples of the patch size: positions are resampled from the pretraining's (timm's bicubic).

    Attributes:
        num_prefix_tokens: tokens before those of the patches: the class token.
        embed_dim: channels D.
        patch_size: (height, width) of a patch in pixels.
        mean, std: what images are normalised with, three channels (red, green, blue) of pixels from 0 to 1.
        load_report: which tensors of the file were loaded, a `checkpoints.LoadReport`.
    """

    num_prefix_tokens = 1
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    load_report: checkpoints.LoadReport

    def embed(self, images: Tensor) -> Tensor:
        """As `VisionTransformer.embed`; `UserError` unless given a batch of images of whole patches."""
        check_images(images, self.in_chans)
        try:
            return super().embed(images)
        except ValueError as error:
            raise UserError(f"{error}: resize or crop it") from None


def check_images(images: Tensor, channels: int = 3) -> None:
    """`UserError` for anything but a batch of float images (B, channels, H, W)."""
    if images.ndim != 4 or images.shape[1] != channels or not images.is_floating_point():
        raise UserError(
            f"images are {tuple(images.shape)} of {str(images.dtype).removeprefix('torch.')}: give normalised floats of"
            f" shape (B, {channels}, H, W)"
        )


def open_checkpoint(file: str | os.PathLike) -> checkpoints.Checkpoint:
    """What a checkpoint of any dialect holds: dialect, weights, sizes, epoch, classes, statistics of its images.

    Args:
        file: of SemAIM, MAE, timm (.pth or .safetensors), DINO, mmpretrain, mmdet, mmseg or detectron2. No code from
            it is run.

    Raises:
        UserError: the file cannot be read, or holds no plain ViT.
    """
    return checkpoints.read(file)


def load_encoder(file: str | os.PathLike, partial: bool = False) -> Encoder:
    """The encoder of a checkpoint of any dialect, in eval mode, on the CPU; its sizes are those of the file.

    Args:
        file: as for `open_checkpoint`; a timm config.json next to it is read too.
        partial: load what fits of an encoder that differs from a plain ViT; the encoder's `load_report` says what was
            left out.

    Raises:
        UserError: the file cannot be read, holds no plain ViT or, without `partial`, one that differs from ours.
    """
    found = checkpoints.read(file)
    try:
        with torch.random.fork_rng(devices=[]):  # initial weights are replaced: the caller's random state is kept
            encoder = Encoder(**buildable(found.sizes))
    except ValueError as error:
        raise UserError(f"no encoder of ours has the sizes of {found.path}: {error}") from None
    encoder.pos_embed.requires_grad_(True)
    encoder.load_report = checkpoints.load(encoder, found, partial=partial)
    statistics = found.statistics or Statistics()
    encoder.mean, encoder.std = statistics.mean, statistics.std
    return encoder.eval()


@torch.no_grad()
def order_of(
    encoder: Any, images: Tensor, order: str = "semantic", similarity: str = "cls", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The order in which pretraining would predict the patches of images.

    Args:
        encoder: from `load_encoder`, or any module from images to tokens with `num_prefix_tokens` and `patch_size`.
        images: (B, 3, H, W), normalised with the encoder's `mean` and `std`.
        order: a name of `semaim.models.ordering.ORDERS`: semantic, similarity, semantic_rings, raster, snake and more.
        similarity: what patches are compared with: "cls" token, "gap" (the mean of the patches), or "self" (attention
            of the class token in the last block).
        seed: of the random numbers that break ties and shuffle.

    Returns:
        The similarity map, float32 (B, L), and the order, int64 (B, L): at [b, k] the patch predicted k-th. Patches
        are numbered row by row.

    Raises:
        UserError: there is no such order or similarity, or the images are not a whole number of patches.
    """
    check_images(images)
    try:
        check_order(order)
    except ValueError as error:
        raise UserError(str(error)) from None
    if similarity not in SIMILARITIES:
        raise UserError(f"unknown similarity {similarity!r}: choose {', '.join(SIMILARITIES[:-1])} or self")
    prefix = encoder.num_prefix_tokens
    if similarity == "self":
        if not hasattr(encoder, "forward_with_attention"):
            raise UserError(f"similarity self needs the attention of a plain ViT, not a {type(encoder).__name__}")
        _, values = encoder.forward_with_attention(images)
    else:
        if similarity == "cls" and not prefix:
            raise UserError("similarity cls: this encoder has no class token: choose gap")
        tokens = encoder(images)
        first = tokens[:, :1]  # of several prefix tokens the class token; without any, gap does not read it
        values = similarity_map(torch.cat([first, tokens[:, prefix:]], dim=1), similarity)
    grid = tuple(side // patch for side, patch in zip(images.shape[-2:], encoder.patch_size, strict=True))
    if values.shape[1] != grid[0] * grid[1]:
        raise UserError(
            f"{values.shape[1]} tokens of patches for {grid[0]} x {grid[1]} patches: look at num_prefix_tokens and"
            " patch_size of the encoder"
        )
    draw = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed)).to(values.device)
    return values, make_order(order, values, grid, draw)
