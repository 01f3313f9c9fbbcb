"""The one encoder: a plain Vision Transformer with timm's parameter names.

Pretraining, classification, detection and segmentation all run these blocks, so a checkpoint needs no conversion
between them.

Shapes: B images, N tokens (class token first, then the patches row by row), L patches, D channels.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath, PatchEmbed, resample_abs_pos_embed, to_2tuple
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from semaim.models.recompute import Linear, in_autocast_dtype, linear, linear_after_gelu, linear_after_norm

#: Widths of the published models. `huge` has patch 14 in MAE and patch 16 in SemAIM's code: the config names it.
SIZES = {
    "tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
    "huge": dict(embed_dim=1280, depth=32, num_heads=16),
}

#: MAE, SemAIM and detectron2's ViTDet all set 1e-6 in place of PyTorch's 1e-5.
LAYER_NORM_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head attention from `x` to itself, or to a separate `context`."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim {dim} cannot be split into {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries from `x`, keys and values from `context` (`x` itself if None), each (B, N, D)."""
        if context is None:
            return self.qkv(x).chunk(3, dim=-1)
        dim = x.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        keys, values = linear(context, weight[dim:], bias[dim:]).chunk(2, dim=-1)
        return linear(x, weight[:dim], bias[:dim]), keys, values

    def forward(self, x: Tensor, context: Tensor | None = None, causal: bool = False) -> Tensor:
        """Attend.

        Args:
            x: (B, N, D) queries.
            context: (B, M, D) keys and values; None for self-attention.
            causal: query i sees keys 0..i only.

        Returns:
            (B, N, D).
        """
        query, key, value = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in self.project(x, context))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        return self.proj(out.transpose(1, 2).flatten(2))

    def class_attention(self, x: Tensor) -> Tensor:
        """Attention weights of the first token on the others, averaged over heads: (B, N, D) -> (B, N - 1).

        The softmax runs over all N tokens, so a row sums to less than 1.
        """
        query, key, _ = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in self.project(x, None))
        scale = key.shape[-1] ** -0.5
        with torch.autocast(x.device.type, enabled=False):  # its maximum is used: bf16 would make ties
            weights = (query[:, :, :1].float() * scale @ key.float().transpose(-2, -1)).softmax(dim=-1)
        return weights.mean(dim=1)[:, 0, 1:]


class CrossAttention(Attention):
    """Attention to a context, with separate q, k and v layers (the names of SemAIM's decoder)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__(dim, num_heads)
        del self.qkv
        self.q = Linear(dim, dim)
        self.k = Linear(dim, dim)
        self.v = Linear(dim, dim)

    def project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries from `x`, keys and values from `context`."""
        if context is None:
            raise ValueError("cross-attention needs a context")
        context = in_autocast_dtype(context)  # one copy for both layers
        return self.q(x), self.k(context), self.v(context)


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))), with timm's names.

    Args:
        dim, hidden, out: channels; `out` is `dim` if None.
    """

    def __init__(self, dim: int, hidden: int, out: int | None = None):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, out or dim)

    def forward(self, x: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        """(..., dim) -> (..., out), of norm(x) if a norm is given."""
        hidden = self.fc1(x) if norm is None else linear_after_norm(x, norm, self.fc1)
        return linear_after_gelu(hidden, self.fc2)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm1(x)), then x + mlp(norm2(x)).

    With a `context` the keys and values come from it, through the same `norm1`. With `with_cp` the activations
    inside the block are computed again in the backward pass instead of being stored.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        with_cp: bool = False,
        attention: Callable[[int, int], Attention] = Attention,
    ):
        super().__init__()
        self.with_cp = with_cp
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def _forward(self, x: Tensor, context: Tensor | None, causal: bool) -> Tensor:
        keys = None if context is None else self.norm1(context)
        x = x + self.drop_path(self.attn(self.norm1(x), keys, causal))
        return x + self.drop_path(self.mlp(x, self.norm2))

    def class_attention(self, x: Tensor) -> Tensor:
        """`Attention.class_attention` of this block's input (B, N, D): (B, N - 1)."""
        return self.attn.class_attention(self.norm1(x))

    def forward(self, x: Tensor, context: Tensor | None = None, causal: bool = False) -> Tensor:
        """(B, N, D) queries, optional (B, M, D) context -> (B, N, D)."""
        if self.with_cp and self.training and torch.is_grad_enabled():
            # Non-reentrant: takes keyword and None arguments, and lets gradients pass to `context` too.
            return checkpoint(self._forward, x, context, causal, use_reentrant=False)
        return self._forward(x, context, causal)


def sincos_positions(dim: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sine-cosine positions of MAE: (1, 1 + L, dim), float32, the class token's row zero.

    The first half of the channels encodes the column and the second the row; in each half all sines come before
    all cosines, frequency k being 10000^-(k / (dim / 4)). Computed in fp64, as the reference does.
    """
    if dim % 4:
        raise ValueError(f"sine-cosine positions need embed_dim divisible by 4, got {dim}")
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    halves = []
    for coordinate in (columns, rows):
        angle = coordinate.flatten()[:, None] * frequency
        halves += [angle.sin(), angle.cos()]
    return F.pad(torch.cat(halves, dim=1), (0, 0, 1, 0)).float()[None]


def resize_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A position table (1, P + L, D) of an old (rows, columns) grid for a new one; the P rows before the patches stay.

    Bicubic without antialiasing, as mmseg's MAE and detectron2's ViTDet do. timm's resampling antialiases, even when it
    enlarges, and gives a different table.
    """
    if old == new:
        return table
    prefix = table.shape[1] - old[0] * old[1]
    patches = table[:, prefix:].unflatten(1, old).permute(0, 3, 1, 2)
    resized = F.interpolate(patches, new, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    return torch.cat([table[:, :prefix], resized], dim=1)


class VisionTransformer(nn.Module):
    """Plain ViT with a class token, for images of any size that the patch size divides.

    Args:
        size: a name of `SIZES`; `embed_dim`, `depth` and `num_heads` override it.
        img_size: side or (height, width) in pixels of the position table.
        patch_size: side or (height, width) in pixels of a patch.
        in_chans: image channels.
        embed_dim: width of a token; None: that of `size`.
        depth: number of blocks; None: that of `size`.
        num_heads: heads of a block's attention; None: those of `size`.
        mlp_ratio: MLP width over `embed_dim`.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        with_cp: recompute activations in the backward pass (less memory, about a third more time).
    """

    def __init__(
        self,
        size: str = "base",
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
    ):
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"unknown size {size!r}: choose from {', '.join(SIZES)}")
        preset = SIZES[size]
        self.embed_dim = embed_dim or preset["embed_dim"]
        self.depth = depth or preset["depth"]
        self.num_heads = num_heads or preset["num_heads"]
        self.mlp_ratio = mlp_ratio
        self.in_chans = in_chans
        self.patch_size = to_2tuple(patch_size)
        self.grid = self.grid_of(to_2tuple(img_size))
        self.patch_embed = PatchEmbed(None, self.patch_size, in_chans, self.embed_dim, strict_img_size=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        self.pos_embed = nn.Parameter(sincos_positions(self.embed_dim, self.grid), requires_grad=False)
        rates = [drop_path_rate * index / max(self.depth - 1, 1) for index in range(self.depth)]
        self.blocks = nn.ModuleList(Block(self.embed_dim, self.num_heads, mlp_ratio, rate, with_cp) for rate in rates)
        self.norm: nn.Module = nn.LayerNorm(self.embed_dim, eps=LAYER_NORM_EPS)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """MAE's initialisation: xavier-uniform linear layers (the patch projection too), class token normal(0.02).

        All biases are zero except the patch projection's, which keeps the default of a convolution: uniform within
        1 / sqrt(values of a patch), as in MAE's and SemAIM's official code.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.detach().flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)

    @staticmethod
    def layer_depth(name: str, depth: int) -> tuple[int, int]:
        """Layer of a parameter for layer-wise learning rates, and the number of layers.

        Embeddings are layer 0, block i is layer i + 1, everything after the blocks is the last layer, depth + 1.
        """
        if name.split(".")[0] in ("cls_token", "pos_embed", "patch_embed"):
            return 0, depth + 2
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1, depth + 2
        return depth + 1, depth + 2

    def get_layer_depth(self, name: str) -> tuple[int, int]:
        """`layer_depth` in this encoder."""
        return self.layer_depth(name, self.depth)

    def grid_of(self, image_size: Sequence[int]) -> tuple[int, int]:
        """(rows, columns) of patches of an image of (height, width) pixels; ValueError if they do not fill it."""
        (height, width), (patch_height, patch_width) = image_size, self.patch_size
        if height < patch_height or width < patch_width or height % patch_height or width % patch_width:
            raise ValueError(
                f"an image of {height} x {width} pixels is no whole number of {patch_height} x {patch_width} patches"
            )
        return height // patch_height, width // patch_width

    @staticmethod
    def resample_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
        """A position table (1, P + L, D) of an old (rows, columns) grid for a new grid, antialiased as in timm."""
        return resample_abs_pos_embed(table, new, old, num_prefix_tokens=table.shape[1] - old[0] * old[1])

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table for a (rows, columns) grid: (1, P + L, D), by `resample_positions` if the grid differs."""
        return self.resample_positions(self.pos_embed, self.grid, grid)

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised -> class and patch tokens with positions (B, 1 + L, D)."""
        position = self.positions(self.grid_of(images.shape[-2:]))
        patches = self.patch_embed(images) + position[:, 1:]
        class_token = (self.cls_token + position[:, :1]).expand(len(images), -1, -1)
        return torch.cat([class_token.to(patches.dtype), patches], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised -> tokens after the final norm (B, 1 + L, D); no token is masked."""
        tokens = self.embed(images)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def forward_with_attention(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, and the last block's class-token attention on the patches (B, L), averaged over heads."""
        tokens = self.embed(images)
        for block in self.blocks[:-1]:
            tokens = block(tokens)
        last = cast(Block, self.blocks[-1])
        attention = last.class_attention(tokens)
        return self.norm(last(tokens)), attention


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens (B, N, D) at index (B, M) -> (B, M, D)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def patchify(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Images (B, C, H, W) -> patches (B, L, ph * pw * C), row by row, the channel running fastest inside a patch."""
    height, width = patch_size
    patches = images.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # (B, C, rows, ph, columns, pw)
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Inverse of `patchify`: patches (B, L, ph * pw * C) of a (rows, columns) grid -> images (B, C, H, W)."""
    images = patches.unflatten(1, grid).unflatten(3, (*patch_size, -1))  # (B, rows, columns, ph, pw, C)
    return images.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
