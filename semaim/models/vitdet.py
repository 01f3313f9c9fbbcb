"""ViTDet: the encoder for dense prediction, and the simple feature pyramid on its last map.

Source: Li et al., Exploring Plain Vision Transformer Backbones for Object Detection (2022); detectron2's
projects/ViTDet at 02b5c4e. Checked against it number by number in `semaim.parity.vitdet`.

Shapes: B images, H x W patches, D channels; inside the encoder maps are channels-last, (B, H, W, D).
"""

import math
from collections import OrderedDict
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, to_2tuple
from torch import Tensor, nn

from semaim.models.relative import KERNELS, relative_attention
from semaim.models.vit import LAYER_NORM_EPS, Attention, Block, VisionTransformer, resize_positions


def window_partition(maps: Tensor, window: int) -> Tensor:
    """Cut maps into windows, row by row, after zero padding at the bottom and right up to whole windows.

    (B, H, W, D) -> (B * windows, window, window, D).
    """
    _, height, width, _ = maps.shape
    maps = F.pad(maps, (0, 0, 0, -width % window, 0, -height % window))
    maps = maps.unflatten(2, (-1, window)).unflatten(1, (-1, window))  # (B, rows, window, columns, window, D)
    return maps.transpose(2, 3).flatten(0, 2)


def window_unpartition(windows: Tensor, grid: tuple[int, int]) -> Tensor:
    """Inverse of `window_partition`, without the padding: (B * windows, window, window, D) -> (B, *grid, D)."""
    window, (height, width) = windows.shape[1], grid
    rows, columns = math.ceil(height / window), math.ceil(width / window)
    maps = windows.unflatten(0, (-1, rows, columns)).transpose(2, 3)  # (B, rows, window, columns, window, D)
    return maps.flatten(3, 4).flatten(1, 2)[:, :height, :width]


class MapAttention(Attention):
    """Self-attention of a map, within windows or over the whole map.

    Args:
        dim, num_heads: of `Attention`.
        window: side of the windows in patches; 0 for the whole map.
        table: (height, width) in patches that the relative positions are made for; None for no relative positions.
        kernel: of the attention with relative positions, one of `KERNELS`.
    """

    def __init__(
        self, dim: int, num_heads: int, window: int = 0, table: tuple[int, int] | None = None, kernel: str = "folded"
    ):
        super().__init__(dim, num_heads)
        self.window, self.kernel = window, kernel
        self.rel_pos = table is not None
        if table is not None:  # zero: a detector starts as the pretrained network, which has no relative positions
            self.rel_pos_h, self.rel_pos_w = (
                nn.Parameter(torch.zeros(2 * side - 1, dim // num_heads)) for side in table
            )

    def attend(self, maps: Tensor) -> Tensor:
        """Attention of every patch to the whole map: (B, H, W, D) -> (B, H, W, D)."""
        _, height, width, _ = maps.shape
        grid = height, width
        query, key, value = (
            t.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in self.project(maps, None)
        )
        if self.rel_pos:
            out = relative_attention(query, key, value, grid, self.rel_pos_h, self.rel_pos_w, self.kernel)
        else:
            out = F.scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).flatten(2).unflatten(1, grid))

    def forward(self, x: Tensor, context: Tensor | None = None, causal: bool = False) -> Tensor:
        """(B, H, W, D) -> (B, H, W, D).

        In windows, the padding takes part as keys and values, as in detectron2. `x` is already normalised, so the
        projection reads zeros there.
        """
        if context is not None or causal:
            raise ValueError("a map attends to all of itself: no context, no causal mask")
        if not self.window:
            return self.attend(x)
        _, height, width, _ = x.shape
        return window_unpartition(self.attend(window_partition(x, self.window)), (height, width))


class ViTDet(VisionTransformer):
    """The plain ViT for dense prediction: windowed attention except in a few global blocks, no class token, no `norm`.

    Its names are those of `VisionTransformer`; only `blocks.N.attn.rel_pos_h` and `rel_pos_w` are new. The position
    table is the pretraining's without the class token's row; it is trained.

    Args:
        size: of `VisionTransformer`.
        img_size: side or (height, width) in pixels of the images. The global blocks' relative positions are made for
            this size, and resampled for images of other sizes.
        pretrain_img_size: the same for the position table, as in the checkpoint.
        window_size: side of the windows in patches.
        global_blocks: indices of the blocks with attention over the whole map; None for the last of each quarter.
        rel_pos: add decomposed relative positions, zero at the start.
        rel_pos_kernel: how the global blocks compute them, see `relative_attention`: "folded" on any device, or
            "triton" on a GPU. Windows are always folded: of 14 x 14 patches they have heads of 96 in place of 64
            channels for 196 keys, while the kernel would pad rows to 16 and multiply as much.
        out_blocks: indices of the blocks whose maps are returned; None for the last block only.
        **encoder: of `VisionTransformer`.

    Attributes:
        made_for: (height, width) in pixels of the images that the relative positions are made for; None without them.
    """

    resamples_patches = True  #: a checkpoint may have patches of another size, as MAE's ViT-H has

    def __init__(
        self,
        size: str = "base",
        img_size: int | tuple[int, int] = 1024,
        pretrain_img_size: int | tuple[int, int] = 224,
        window_size: int = 14,
        global_blocks: tuple[int, ...] | None = None,
        rel_pos: bool = True,
        rel_pos_kernel: str = "folded",
        out_blocks: tuple[int, ...] | None = None,
        **encoder,
    ):
        super().__init__(size, pretrain_img_size, **encoder)
        del self.cls_token, self.norm
        # A plain clone would keep the strides of the slice, and DDP warns of gradients with others.
        patches = self.pos_embed[:, 1:].detach().clone(memory_format=torch.contiguous_format)
        self.pos_embed = nn.Parameter(patches)
        if global_blocks is None:  # of 12 blocks 2, 5, 8, 11
            global_blocks = tuple(sorted({math.ceil(quarter * self.depth / 4) - 1 for quarter in (1, 2, 3, 4)}))
        for name, chosen in (("global_blocks", global_blocks), ("out_blocks", out_blocks or ())):
            if wrong := [index for index in chosen if not 0 <= index < self.depth]:
                raise ValueError(f"{name} {wrong}: there are blocks 0 to {self.depth - 1}")
        if window_size < 1:
            raise ValueError(f"window_size {window_size}: list all blocks in global_blocks to use no windows")
        if rel_pos_kernel not in KERNELS:
            raise ValueError(f"rel_pos_kernel {rel_pos_kernel!r}: choose from {', '.join(KERNELS)}")
        self.global_blocks, self.window_size = tuple(global_blocks), window_size
        self.out_blocks = out_blocks and tuple(out_blocks)
        whole = self.grid_of(to_2tuple(img_size))
        self.made_for = to_2tuple(img_size) if rel_pos and self.global_blocks else None
        for index, block in enumerate(self.blocks):
            window, table, kernel = window_size, to_2tuple(window_size), "folded"
            if index in self.global_blocks:
                window, table, kernel = 0, whole, rel_pos_kernel
            block = cast(Block, block)
            plain = block.attn
            block.attn = MapAttention(self.embed_dim, self.num_heads, window, table if rel_pos else None, kernel)
            block.attn.qkv, block.attn.proj = plain.qkv, plain.proj  # initialised as the encoder's

    resample_positions = staticmethod(resize_positions)

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, height, width), normalised -> patch tokens with positions, as a map (B, H, W, D)."""
        grid = self.grid_of(images.shape[-2:])
        return (self.patch_embed(images) + self.positions(grid)).unflatten(1, grid)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Images (B, 3, height, width), normalised -> the last block's map (B, D, H, W), or those of `out_blocks`."""
        maps, outs = self.embed(images), []
        for index, block in enumerate(self.blocks):
            maps = block(maps)
            if index in (self.out_blocks or ()):
                outs.append(maps.permute(0, 3, 1, 2))
        return tuple(outs) if self.out_blocks else maps.permute(0, 3, 1, 2)


class SimpleFeaturePyramid(nn.Module):
    """Levels of several strides from one map.

    Every level is resampled from the map (transposed convolutions or a max-pool). A 1x1 and a 3x3 convolution follow,
    each with a LayerNorm over the channels of a position. There is no activation at the end.

    Args:
        in_channels: of the map.
        out_channels: of the levels.
        stride: of the map in pixels.
        scales: of the levels relative to the map, finest first; from 4, 2, 1, 0.5.
        extra_level: one more level of half the side: every second value of the last level.

    Attributes:
        strides: of the levels in pixels: 4, 8, 16, 32, 64.
        names: of the levels, after the logarithm of the stride: p2, p3, p4, p5, p6.

    Source: ViTDet, section 3 and appendix A.2; `SimpleFeaturePyramid` of detectron2's modeling/backbone/vit.py.
    """

    def __init__(
        self,
        in_channels: int = 768,
        out_channels: int = 256,
        stride: int = 16,
        scales: tuple[float, ...] = (4, 2, 1, 0.5),
        extra_level: bool = True,
    ):
        super().__init__()
        self.extra_level = extra_level
        strides = [stride / scale for scale in scales]
        if extra_level:
            strides.append(2 * strides[-1])
        if any(s < 1 or not math.log2(s).is_integer() for s in strides):
            raise ValueError(f"levels of strides {strides} have no names: each has to be a power of two")
        if any(coarse != 2 * fine for fine, coarse in zip(strides, strides[1:], strict=False)):
            raise ValueError(f"levels of strides {strides}: each has to be twice the one before")
        self.strides = tuple(int(s) for s in strides)
        self.names = tuple(f"p{int(math.log2(s))}" for s in strides)
        self.levels = nn.ModuleDict(
            {name: level(in_channels, out_channels, scale) for name, scale in zip(self.names, scales, strict=False)}
        )

    def forward(self, maps: Tensor) -> tuple[Tensor, ...]:
        """(B, in_channels, H, W) -> (B, out_channels, scale * H, scale * W) for every level, finest first."""
        levels = [level(maps) for level in self.levels.values()]
        if self.extra_level:
            levels.append(F.max_pool2d(levels[-1], kernel_size=1, stride=2))
        return tuple(levels)


class MapScales(nn.ModuleList):
    """Maps of one stride -> 4, 2, 1 and 1/2 times their size, channels unchanged: the input of an ordinary FPN.

    Args:
        channels: of the maps.

    Source: Li et al., Benchmarking Detection Transfer Learning with Vision Transformers (2021), whose code is not
    public; the layers are those of hustvl/MIMDet, which reproduces its results.
    """

    def __init__(self, channels: int = 768):
        up = [nn.ConvTranspose2d(channels, channels, 2, 2) for _ in range(3)]
        finest = nn.Sequential(up[0], nn.GroupNorm(32, channels), nn.GELU(), up[1])
        super().__init__([finest, up[2], nn.Identity(), nn.MaxPool2d(2)])

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Four maps (B, channels, H, W) -> (B, channels, scale * H, scale * W) each, finest first."""
        return tuple(resample(one) for resample, one in zip(self, maps, strict=True))


def level(in_channels: int, out_channels: int, scale: float) -> nn.Sequential:
    """One level of the pyramid: (B, in_channels, H, W) -> (B, out_channels, scale * H, scale * W)."""
    half, quarter = in_channels // 2, in_channels // 4
    resample: tuple[nn.Module, ...]
    if scale == 4:
        norm = LayerNorm2d(half, eps=LAYER_NORM_EPS)
        up = nn.ConvTranspose2d(in_channels, half, 2, 2), norm, nn.GELU(), nn.ConvTranspose2d(half, quarter, 2, 2)
        resample, channels = up, quarter
    elif scale == 2:
        resample, channels = (nn.ConvTranspose2d(in_channels, half, 2, 2),), half
    elif scale == 1:
        resample, channels = (), in_channels
    elif scale == 0.5:
        resample, channels = (nn.MaxPool2d(2, 2),), in_channels
    else:
        raise ValueError(f"a level of scale {scale}: choose from 4, 2, 1, 0.5")
    return nn.Sequential(
        OrderedDict(
            resample=nn.Sequential(*resample),
            lateral=nn.Conv2d(channels, out_channels, 1, bias=False),
            lateral_norm=LayerNorm2d(out_channels, eps=LAYER_NORM_EPS),
            output=nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            output_norm=LayerNorm2d(out_channels, eps=LAYER_NORM_EPS),
        )
    )
