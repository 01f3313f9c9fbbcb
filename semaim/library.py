"""The public library: checkpoints, encoders and orders for use outside the suite's own commands.

Shapes: B images, L patches, D channels; tokens are (B, prefix + L, D), the class token first.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from timm.layers import to_2tuple
from torch import Tensor

from semaim import checkpoints
from semaim.checkpoints.consumers import buildable
from semaim.checkpoints.normalisation import Statistics
from semaim.data.folder import centre_crops
from semaim.encoders.contract import Encoder
from semaim.encoders.own import OwnEncoder
from semaim.encoders.sources import open_source
from semaim.errors import UserError
from semaim.models.ordering import check_order, make_order, similarity_map

#: What patches are compared with: class token, mean of the patches, or the last block's attention of the class token.
SIMILARITIES = ("cls", "gap", "self")


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


def load_encoder(
    source: str | os.PathLike,
    arch: str | None = None,
    img_size: int | tuple[int, int] | None = None,
    partial: bool = False,
) -> Encoder:
    """A pretrained plain ViT of any family, in eval mode, on the CPU.

    It is called with images (B, 3, H, W), normalised by its `mean` and `std`, H and W any multiples of its patch size,
    and returns the tokens after the final norm (B, prefix + L, D). `features(images, pool)` gives one vector per image,
    `maps(images, blocks)` the maps (B, D, H', W') of blocks; `num_prefix_tokens`, `embed_dim`, `patch_size` its sizes.

    Args:
        source: a file of any dialect, `timm:NAME[.TAG]`, `hf-hub:OWNER/REPO` or `local-dir:DIR`; a config.json next to
            a file is read too.
        arch: timm's name of the architecture, perhaps with the tag of the weights, for a file that does not tell it.
        img_size: side or (height, width) in pixels that position tables are resampled for; None for the source's own.
            Images of other sizes are possible, too.
        partial: load what fits into our own ViT of an encoder that differs from it; `report` says what was left out.

    Returns:
        The encoder, with `mean` and `std`, three channels (red, green, blue) of pixels from 0 to 1, and `report`, a
        `checkpoints.LoadReport`.

    Raises:
        UserError: the source is not understood: no such file or name, no plain ViT, tensors that are missing or not
            read, an architecture or statistics that it does not determine.
    """
    if partial:
        return _partly_loaded(source)
    found = open_source(source, arch)
    statistics = found.preparation.statistics
    if statistics is None:
        raise UserError(found.preparation.unknown.replace("--arch ", "arch="))
    with torch.random.fork_rng(devices=[]):  # initial weights are replaced: the caller's random state is kept
        encoder = found.build(**({"img_size": to_2tuple(img_size)} if img_size is not None else {}))
    return _finished(encoder, encoder.load(found), statistics)


def _partly_loaded(source: str | os.PathLike) -> Encoder:
    found = checkpoints.read(source)
    try:
        with torch.random.fork_rng(devices=[]):
            encoder = OwnEncoder(**buildable(found.sizes))
    except ValueError as error:
        raise UserError(f"no encoder of ours has the sizes of {found.path}: {error}") from None
    return _finished(encoder, checkpoints.load(encoder, found, partial=True), found.statistics or Statistics())


def _finished(encoder: Encoder, report: checkpoints.LoadReport, statistics: Statistics) -> Encoder:
    encoder.report, encoder.mean, encoder.std = report, statistics.mean, statistics.std
    return encoder.eval()


def load_images(files: Sequence[str | os.PathLike], encoder: Any, img_size: int | None = None) -> Tensor:
    """Photographs as an encoder takes them: the middle square of each, normalised.

    Args:
        files: of the images, as in `semaim.find_images`.
        encoder: from `load_encoder`; its `mean` and `std` are used.
        img_size: side in pixels, a multiple of the patch size; None for the encoder's own.

    Returns:
        Floats (B, 3, side, side).

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    pixels = _crops(files, encoder, img_size).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.mean, encoder.std))
    return (pixels - mean) / std


def draw_orders(
    files: Sequence[str | os.PathLike],
    encoder: Any,
    order: str = "semantic",
    similarity: str = "cls",
    img_size: int | None = None,
) -> Image.Image:
    """A picture of the order in which pretraining would predict the patches of photographs: one row per image.

    Image, similarity map, and order (bright first). Arguments as for `load_images` and `order_of`.
    """
    from semaim.drawing.columns import order_columns  # matplotlib takes a second to import
    from semaim.drawing.panels import lay_out

    images = load_images(files, encoder, img_size)
    values, found = order_of(encoder, images, order, similarity)
    height, width = (side // patch for side, patch in zip(images.shape[-2:], encoder.patch_size, strict=True))
    return lay_out(order_columns(_crops(files, encoder, img_size), values, found, (height, width)))


def _crops(files: Sequence[str | os.PathLike], encoder: Any, img_size: int | None) -> Tensor:
    if isinstance(files, str | os.PathLike):
        raise UserError(f"files is {files}: give a list of files")
    if not files:
        raise UserError("no files of images")
    return centre_crops([os.fspath(file) for file in files], img_size or encoder.img_size[0])


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
        if similarity == "cls" and not getattr(encoder, "has_class_token", prefix):
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
