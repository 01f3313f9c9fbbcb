"""SimMIM: a mask token stands in for the removed patches, and a linear layer predicts their pixels.

One training step, top to bottom (Xie et al., CVPR 2022; official code microsoft/SimMIM at 0e71746):

1. *Mask.* Squares of `mask_size` pixels are chosen by the uniform numbers, `mask_ratio` of them.
2. *Encode.* A learnt token replaces the embedding of each masked patch; the encoder sees all patches.
3. *Predict.* A linear layer predicts the pixels of every patch; the L1 loss falls on the masked ones.

Differences from the official ViT: positions are the suite's fixed sine-cosine table, where theirs are a bias table that
all blocks share; blocks have no layer scale; weights start as in MAE; the class token decays. So the encoder is the
plain ViT that every task of the suite reads.
"""

import math
from typing import Any, NamedTuple

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from semaim.engine.pretraining import build_target
from semaim.models import PixelTarget, VisionTransformer
from semaim.registry import METHODS, Method, Variant


class Output(NamedTuple):
    """What a training step produced; patches are in image order (row by row)."""

    loss: Tensor  #: scalar, mean over the masked patches of all images
    loss_map: Tensor  #: (B, L), of all patches
    prediction: Tensor  #: (B, L, width)
    target: Tensor  #: (B, L, width)
    mask: Tensor  #: (B, L) float32, 1 where masked


class SimMIM(VisionTransformer):
    """The encoder with a mask token and a linear prediction head.

    Args:
        target: the pixels of each patch; in the paper neither blurred nor normalised per patch, with an L1 loss.
        mask_ratio: share of the squares that is masked, rounded up.
        mask_size: side or (height, width) in pixels of a square; a whole number of patches.
        **encoder: arguments of `VisionTransformer`.
    """

    def __init__(self, target: PixelTarget, mask_ratio: float = 0.6, mask_size: int | tuple[int, int] = 32, **encoder):
        super().__init__(**encoder)
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask_ratio {mask_ratio} is no share of the patches between 0 and 1")
        self.target, self.mask_ratio = target, mask_ratio
        self.square = tuple(m // p for m, p in zip(to_2tuple(mask_size), self.patch_size, strict=True))
        whole = tuple(s * p for s, p in zip(self.square, self.patch_size, strict=True)) == to_2tuple(mask_size)
        if not whole or any(side % part for side, part in zip(self.grid, self.square, strict=True)):
            raise ValueError(f"mask_size {mask_size}: squares have to be whole patches, and the image whole squares")
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        self.prediction_head = nn.Linear(self.embed_dim, target.width)
        self.reset_parameters()
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def mask(self, draw: Tensor, grid: tuple[int, int]) -> Tensor:
        """Choose the masked patches.

        Args:
            draw: (B, L) uniform numbers; a square uses that of its first patch, and the smallest are masked.
            grid: rows and columns of patches.

        Returns:
            (B, L) float32, 1 where masked.
        """
        height, width = self.square
        squares = draw.unflatten(1, grid)[:, ::height, ::width].flatten(1)
        count = math.ceil(squares.shape[1] * self.mask_ratio)
        place = squares.argsort(dim=-1, stable=True).argsort(dim=-1)
        masked = (place < count).float().unflatten(1, (grid[0] // height, grid[1] // width))
        return masked.repeat_interleave(height, 1).repeat_interleave(width, 2).flatten(1)

    def forward(self, images: Tensor, draw: Tensor | None = None) -> Output:
        """One step's loss.

        Args:
            images: (B, 3, H, W), normalised.
            draw: (B, L) uniform numbers in [0, 1); drawn here if None.
        """
        grid = self.grid_of(images.shape[-2:])
        if draw is None:
            draw = torch.rand(len(images), grid[0] * grid[1], device=images.device)
        mask, position = self.mask(draw, grid), self.positions(grid)
        patches = self.patch_embed(images)
        patches = torch.where(mask[..., None].bool(), self.mask_token.to(patches.dtype), patches) + position[:, 1:]
        first = (self.cls_token + position[:, :1]).expand(len(images), -1, -1)
        tokens = torch.cat([first.to(patches.dtype), patches], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        prediction = self.prediction_head(self.norm(tokens)[:, 1:])
        target = self.target.prepare(images)
        loss_map = self.target.loss(prediction, target)
        return Output((loss_map * mask).sum() / mask.sum(), loss_map, prediction, target, mask)


@METHODS.register_module(name="SimMIM")
class SimMIMMethod(Method):
    """It is drawn by its mask, as MAE is: see `semaim.drawing.encoder`."""

    network = SimMIM
    place = 2
    variants = {
        "simmim": Variant(
            {
                "pretrain": {
                    "quick": "semaim/configs/pretrain/simmim_vit_tiny_scenes_easy.py",
                    "study": "semaim/configs/pretrain/simmim_vit_tiny_cifar10.py",
                    "paper": "semaim/configs/pretrain/simmim_vit_base_800e.py",
                }
            }
        )
    }
    words = {frozenset({"simmim"}): "SimMIM"}

    @classmethod
    def build(cls, *, target: dict, **arguments: Any) -> SimMIM:
        """Target as dict(type="PixelTarget", ...)."""
        return SimMIM(build_target(target, arguments.get("patch_size", 16)), **arguments)

    @staticmethod
    def describe(network: SimMIM) -> str:
        """The mask ratio, the size of the squares, and the target."""
        height, width = (s * p for s, p in zip(network.square, network.patch_size, strict=True))
        share = f"mask ratio {network.mask_ratio:g} in squares of {height} x {width} px"
        return f"{share}; target {type(network.target).__name__}"
