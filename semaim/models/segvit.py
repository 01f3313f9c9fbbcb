"""The encoder for semantic segmentation: maps of several blocks, relative position bias, layer scale.

Source: BEiT's and MAE's segmentation backbones (mmseg's `BEiT` and `MAE`). Parameters are named as in
`VisionTransformer`; `attn.rel_bias`, `gamma_1` and `gamma_2` are new.
"""

import math
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from semaim.models.vit import Attention, Block, VisionTransformer, resize_positions


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # the cached tensor is used outside inference mode too
def bias_index(grid: tuple[int, int], device: torch.device) -> Tensor:
    """The row of the bias table for every pair of tokens of a grid: int64 (1 + L, 1 + L), [query, key].

    A table has a row for each of the (2 H - 1) (2 W - 1) offsets of two patches, row by row from the most negative
    offset, then one each for class token to patch, patch to class token, and class token to itself. As in BEiT.
    """
    height, width = grid
    place = torch.arange(height * width, device=device)
    row, column = place // width, place % width
    down = row[:, None] - row + height - 1
    right = column[:, None] - column + width - 1
    index = F.pad(down * (2 * width - 1) + right, (1, 0, 1, 0))
    offsets = (2 * height - 1) * (2 * width - 1)
    index[0, :], index[:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
    return index


class SpreadBias(torch.autograd.Function):
    """The bias of all pairs of tokens from a table (rows, heads): (heads, 1 + L, 1 + L), in a given dtype.

    As `table[bias_index(grid)]`, whose gradient PyTorch adds up by sorting all pairs. An offset's gradient is the sum
    of a diagonal: with the queries in reverse order, `fold` adds what it adds of overlapping patches of an image.
    """

    @staticmethod
    def forward(ctx, table: Tensor, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """See above."""
        ctx.grid = grid
        index = bias_index(grid, table.device)
        # In the order of the result, so that there is one copy and no transposed one.
        return table.T.to(dtype).contiguous().index_select(1, index.flatten()).unflatten(1, index.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        """Sums in fp32 at least."""
        (height, width), wide = ctx.grid, torch.promote_types(grad.dtype, torch.float32)
        pairs = grad[:, 1:, 1:].flip(1).to(wide).flatten(0, 1)[None]  # (1, heads * L, L)
        offsets = F.fold(pairs, (2 * height - 1, 2 * width - 1), ctx.grid)[0].flip(1, 2).flatten(1)
        ends = grad[:, 0, 1:].sum(1, dtype=wide), grad[:, 1:, 0].sum(1, dtype=wide), grad[:, 0, 0].to(wide)
        return torch.cat([offsets, torch.stack(ends, dim=1)], dim=1).T, None, None


def resize_bias(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A bias table (rows, heads) of an old grid for a new grid: bicubic over offsets; the class token's rows stay."""
    if old == new:
        return table
    patches, token = table[:-3], table[-3:]
    image = patches.T.unflatten(1, (2 * old[0] - 1, 2 * old[1] - 1))[None]
    size = (2 * new[0] - 1, 2 * new[1] - 1)
    resized = F.interpolate(image.float(), size, mode="bicubic", align_corners=False)[0].flatten(1).T
    return torch.cat([resized.to(table.dtype), token])


class BiasedAttention(Attention):
    """Self-attention with a bias per head and offset, zero at the start; `grid` is the grid its table is made for."""

    def __init__(self, dim: int, num_heads: int, grid: tuple[int, int]):
        super().__init__(dim, num_heads)
        self.grid = grid
        self.rel_bias = nn.Parameter(torch.zeros((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3, num_heads))

    def bias(self, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The bias of a (rows, columns) grid: (heads, 1 + L, 1 + L)."""
        return SpreadBias.apply(resize_bias(self.rel_bias, self.grid, grid), grid, dtype)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, 1 + L, D) of a (rows, columns) grid -> (B, 1 + L, D)."""
        query, key, value = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in self.project(x, None))
        bias = self.bias(grid, query.dtype)[None]  # contiguous and of this dtype: else no fused GPU kernel accepts it
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.proj(out.transpose(1, 2).flatten(2))


class SegmentationBlock(Block):
    """A `Block` with optional bias and layer scale: x + gamma_1 * attention, then x + gamma_2 * mlp."""

    gamma_1: float | nn.Parameter
    gamma_2: float | nn.Parameter

    def __init__(self, plain: Block, dim: int, grid: tuple[int, int], rel_bias: bool, layer_scale: float | None):
        nn.Module.__init__(self)
        for name, module in plain.named_children():  # initialised as the encoder's
            self.add_module(name, module)
        self.with_cp, self.rel_bias = plain.with_cp, rel_bias
        if rel_bias:
            attention = BiasedAttention(dim, plain.attn.num_heads, grid)
            attention.qkv, attention.proj = plain.attn.qkv, plain.attn.proj
            self.attn = attention
        self.gamma_1 = self.gamma_2 = 1.0
        if layer_scale is not None:
            self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((dim,), float(layer_scale))) for _ in range(2))

    def _step(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        attended = self.attn(self.norm1(x), grid) if self.rel_bias else self.attn(self.norm1(x))
        x = x + self.drop_path(self.gamma_1 * attended)
        return x + self.drop_path(self.gamma_2 * self.mlp(x, self.norm2))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, 1 + L, D) of a (rows, columns) grid -> (B, 1 + L, D)."""
        if self.with_cp and self.training and torch.is_grad_enabled():
            return checkpoint(self._step, x, grid, use_reentrant=False)
        return self._step(x, grid)


class SegmentationViT(VisionTransformer):
    """The plain ViT, returning the maps of several blocks; no final norm.

    Images may be of any size and need not be square. An image that whole patches do not fill is stretched to the next
    size that they do, so that the maps, and the predictions made from them, cover it exactly.

    Args:
        size: of `VisionTransformer`.
        img_size: side or (height, width) in pixels of the training crops. Position and bias tables are made for this
            size. A checkpoint's position table is resized once, when it is loaded, and then trained. For images of
            another size the trained tables are resized in the forward pass.
        out_blocks: indices of the blocks whose maps are returned; None for four evenly spaced: 3, 5, 7, 11 of 12 as
            published, and the last of each quarter of other depths.
        rel_bias: add a relative position bias in every block, zero at the start.
        layer_scale: initial value of a learned scale per channel of each branch; None for no scale.
        **encoder: of `VisionTransformer`.

    Attributes:
        made_for: (height, width) in pixels of the crops that the bias tables are made for; None without them.
    """

    resamples_patches = True  #: a checkpoint may have patches of another size, as MAE's ViT-H has

    def __init__(
        self,
        size: str = "base",
        img_size: int | tuple[int, int] = 512,
        out_blocks: tuple[int, ...] | None = None,
        rel_bias: bool = True,
        layer_scale: float | None = None,
        **encoder,
    ):
        super().__init__(size, img_size, **encoder)
        del self.norm
        self.made_for = to_2tuple(img_size) if rel_bias else None
        self.pos_embed.requires_grad_(True)
        if out_blocks is None:
            quarters = sorted({math.ceil(quarter * self.depth / 4) - 1 for quarter in (1, 2, 3, 4)})
            out_blocks = (3, 5, 7, 11) if self.depth == 12 else tuple(quarters)
        if not out_blocks or not all(0 <= index < self.depth for index in out_blocks):
            raise ValueError(f"out_blocks {tuple(out_blocks)}: there are blocks 0 to {self.depth - 1}")
        self.out_blocks = tuple(out_blocks)
        self.blocks = nn.ModuleList(
            SegmentationBlock(cast(Block, block), self.embed_dim, self.grid, rel_bias, layer_scale)
            for block in self.blocks
        )

    resample_positions = staticmethod(resize_positions)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, height, width), normalised -> one map (B, D, H, W) per block of `out_blocks`."""
        size = images.shape[-2:]
        sides = [math.ceil(side / patch) * patch for side, patch in zip(size, self.patch_size, strict=True)]
        if sides != list(size):
            images = F.interpolate(images, sides, mode="bilinear", align_corners=False)
        grid = self.grid_of(images.shape[-2:])
        tokens, maps = self.embed(images), []
        for index, block in enumerate(self.blocks):
            tokens = block(tokens, grid)
            if index in self.out_blocks:
                maps.append(tokens[:, 1:].transpose(1, 2).unflatten(2, grid).contiguous())
        return tuple(maps)
