"""The networks of the tasks on top of any `Encoder`: classifier, ViTDet's map, the maps of several blocks.

Configs name them `Classifier` (which is a `PlainClassifier` where an `encoder` is given), `PlainViTDet`,
`PlainSegmentationViT` and `FrozenViT`. Their `encoder` is a description, see `contract.build`; the run takes it from
the source of the weights.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from semaim.encoders.contract import POOLS, Encoder, build
from semaim.encoders.windows import PREFIXES, Geometry, restrict
from semaim.errors import UserError
from semaim.models.attentive import ATTENTIVE, tokens_read
from semaim.models.classifier import attended, make_head


def quarters(depth: int) -> tuple[int, ...]:
    """The last block of each quarter: of 12 blocks 2, 5, 8, 11."""
    return tuple(sorted({math.ceil(quarter * depth / 4) - 1 for quarter in (1, 2, 3, 4)}))


def check_blocks(name: str, blocks: Sequence[int], depth: int) -> tuple[int, ...]:
    """The blocks as a tuple; `UserError` if there are none, or others than the encoder has."""
    if not blocks or not all(0 <= index < depth for index in blocks):
        raise UserError(f"{name} {tuple(blocks)}: there are blocks 0 to {depth - 1}")
    return tuple(sorted(blocks))


class OnEncoder(nn.Module):
    """Base of the networks: an encoder, frozen if asked for.

    Attributes:
        sized: whether the encoder is this suite's own ViT, of the sizes in the config and not of the weights' source.

    Args:
        encoder: the description of the encoder; None until the source of the weights gives it.
        freeze: the encoder is not trained, and always in eval mode.
        **changes: arguments of the encoder that the task sets.
    """

    sized = False

    def __init__(self, encoder: Mapping[str, Any] | None, freeze: bool = False, **changes: Any):
        super().__init__()
        if encoder is None:
            raise UserError("no encoder yet: name its source, such as --pretrained timm:NAME or FILE --arch NAME")
        self.encoder: Encoder = build(encoder, **changes)
        self.freeze = freeze

    def finish(self) -> None:
        """Freeze what is frozen; called at the end of the constructors."""
        if self.freeze:
            self.encoder.requires_grad_(False)

    def train(self, mode: bool = True):
        """A frozen encoder stays in eval mode: no drop path."""
        super().train(mode)
        if self.freeze:
            self.encoder.eval()
        return self

    @staticmethod
    def map_width(encoder: Encoder) -> int:
        """The number of channels of the maps that the network makes with this encoder."""
        return encoder.embed_dim

    def get_layer_depth(self, name: str) -> tuple[int, int]:
        """The encoder's layers; everything else belongs to the last."""
        layers = self.encoder.get_layer_depth("head")[1]
        inner = name.removeprefix("encoder.")
        return self.encoder.get_layer_depth(inner) if inner != name else (layers - 1, layers)

    def no_weight_decay(self) -> set[str]:
        """The encoder's."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}


class PlainClassifier(OnEncoder):
    """An encoder with a linear head on its pooled tokens: fine-tuning, linear probing, features.

    Args:
        encoder: of `OnEncoder`.
        num_classes: of the head; 0 for no head.
        pool: a name of `contract.POOLS`, or of `ATTENTIVE`.
        probe: the encoder is frozen, and the head is preceded by a batch normalisation without affine parameters.
        head_init_std: of the head's truncated normal initialisation.
        img_size: side or (height, width) in pixels of the images; None for the encoder's own.
        drop_path_rate: of the last block, rising linearly from 0 at the first.
        with_cp: recompute activations in the backward pass.
        attention: further arguments of `attentive_head`.
    """

    def __init__(
        self,
        encoder: Mapping[str, Any] | None = None,
        num_classes: int = 1000,
        pool: str = "cls",
        probe: bool = False,
        head_init_std: float = 2e-5,
        img_size: int | tuple[int, int] | None = None,
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
        attention: dict | None = None,
    ):
        super().__init__(encoder, probe, img_size=img_size, drop_path_rate=drop_path_rate, with_cp=with_cp)
        # Attention reads tokens as the mean does; `ep_all` the class token too.
        self.encoder.keep_for_pool(pool if pool not in ATTENTIVE else "cls" if ATTENTIVE[pool][1] else "avg")
        self.pool, self.probe, self.num_classes = pool, probe, num_classes
        self.embed_dim = self.encoder.width_of(pool)  # an attentive probe reads tokens, whose width that of "avg" is
        self.img_size, self.num_prefix_tokens = self.encoder.img_size, self.encoder.num_prefix_tokens
        self.head = make_head(self.embed_dim, num_classes, probe, head_init_std, pool, attention)
        self.finish()

    @property
    def pooling(self) -> str:
        """A short description of `features` for logs and results."""
        return attended(self.pool) if self.pool in ATTENTIVE else POOLS[self.pool]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of an image's pooled features and tokens."""
        rows, columns = self.encoder.grid_of(self.img_size)
        tokens = (self.num_prefix_tokens + rows * columns, self.encoder.width_of("avg"))
        return {"features": (self.embed_dim,), "tokens": tokens}

    def tokens(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised -> tokens after the final norm (B, P + L, D)."""
        return self.encoder(images)

    def pooled(self, tokens: Tensor) -> Tensor:
        """What the head reads of `tokens`: (B, D), or (B, N, D) in an attentive probe."""
        if self.pool in ATTENTIVE:
            return tokens_read(self.pool, tokens, self.num_prefix_tokens)
        return self.encoder.pool(tokens, self.pool)

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised -> what the head reads: (B, D), or (B, N, D) in an attentive probe."""
        return self.pooled(self.tokens(images))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised -> logits (B, num_classes)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.probe):
            features = self.features(images)
        return self.head(features)


class PlainViTDet(OnEncoder):
    """Any encoder for ViTDet: attention within windows except in a few blocks; its last map, or those of `out_blocks`.

    Args:
        encoder: of `OnEncoder`.
        img_size: side or (height, width) in pixels of the images in training.
        patch_size: side of a patch in pixels; the projection of other patches is resampled when weights are loaded.
            None for the encoder's own.
        window_size: side of the windows in patches; None for the window of the encoder's own tables of relative
            positions, else the largest divisor of the map's side up to 16, so that windows are whole.
        global_blocks: blocks that attend to the whole map; None for the last of each quarter.
        prefix: "seen": patches attend to the prefix tokens, as in the encoder, and these to everything. "dropped":
            patches do not see them.
        out_blocks: blocks whose maps are returned; None for the last one.
        freeze: of `OnEncoder`.
        drop_path_rate: of the last block, rising linearly from 0 at the first.
        with_cp: recompute activations in the backward pass.
    """

    def __init__(
        self,
        encoder: Mapping[str, Any] | None = None,
        img_size: int | tuple[int, int] = 1024,
        patch_size: int | None = 16,
        window_size: int | None = None,
        global_blocks: Sequence[int] | None = None,
        prefix: str = "seen",
        out_blocks: Sequence[int] | None = None,
        freeze: bool = False,
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
    ):
        sizes = {"img_size": to_2tuple(img_size), "patch_size": patch_size}
        super().__init__(encoder, freeze, **sizes, drop_path_rate=drop_path_rate, with_cp=with_cp)
        depth, grid = self.encoder.depth, self.encoder.grid_of(to_2tuple(img_size))
        if prefix not in PREFIXES:
            raise UserError(f"prefix {prefix!r}: choose from {', '.join(PREFIXES)}")
        whole = quarters(depth) if global_blocks is None else tuple(global_blocks)
        self.global_blocks = check_blocks("global_blocks", whole, depth) if whole else ()
        self.out_blocks = None if out_blocks is None else check_blocks("out_blocks", out_blocks, depth)
        table = self.encoder.table_window
        self.window_size = window_size or table or dividing(grid)
        self.made_for = to_2tuple(img_size) if table else None
        self.encoder.keep_for_maps()
        self.geometry = Geometry(self.encoder.num_prefix_tokens, prefix == "seen")
        if self.encoder.windowed_itself and (window_size or global_blocks or prefix != "seen"):
            raise UserError(f"{self.encoder.title} has windows of its own: leave window_size and global_blocks open")
        for index, block in enumerate(() if self.encoder.windowed_itself else self.encoder.blocks):
            windowed = index not in self.global_blocks
            if windowed or prefix == "dropped":
                window, tables = (self.window_size, bool(table)) if windowed else (0, False)
                restrict(block, self.geometry, window, f"{self.encoder.title}, a block", tables)
            if windowed and table:
                self.encoder.restrict_tables(index, self.window_size)
        if prefix == "dropped":
            for name, parameter in self.encoder.named_parameters():
                if name.rpartition(".")[2] in ("cls_token", "reg_token", "dist_token"):
                    parameter.requires_grad_(False)  # no map depends on it
        self.finish()

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Images (B, 3, height, width), normalised -> the last block's map (B, D, H, W), or those of `out_blocks`."""
        self.geometry.grid = self.encoder.grid_of(images.shape[-2:])
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            found = self.encoder.maps(images, self.out_blocks or (self.encoder.depth - 1,))
        return tuple(found) if self.out_blocks else found[0]


def dividing(grid: tuple[int, int], most: int = 16) -> int:
    """The largest window up to `most` that divides both sides of a grid; `most` if that is less than 7."""
    found = max(window for window in range(1, most + 1) if not (grid[0] % window or grid[1] % window))
    return found if found >= 7 else min(most, *grid)


class PlainSegmentationViT(OnEncoder):
    """Any encoder for segmentation: the maps of several blocks, before the final norm.

    Images may be of any size: one that whole patches do not fill is stretched to the next size that they do.

    Args:
        encoder: of `OnEncoder`.
        img_size: side or (height, width) in pixels of the training crops, for which position tables are resampled.
        patch_size: side of a patch in pixels; the projection of other patches is resampled when weights are loaded.
            None for the encoder's own.
        out_blocks: blocks whose maps are returned; None for the last of each quarter, and of 12 blocks 3, 5, 7, 11.
        freeze: of `OnEncoder`.
        drop_path_rate: of the last block, rising linearly from 0 at the first.
        with_cp: recompute activations in the backward pass.
    """

    def __init__(
        self,
        encoder: Mapping[str, Any] | None = None,
        img_size: int | tuple[int, int] = 512,
        patch_size: int | None = 16,
        out_blocks: Sequence[int] | None = None,
        freeze: bool = False,
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
    ):
        sizes = {"img_size": to_2tuple(img_size), "patch_size": patch_size}
        super().__init__(encoder, freeze, **sizes, drop_path_rate=drop_path_rate, with_cp=with_cp)
        depth = self.encoder.depth
        default = (3, 5, 7, 11) if depth == 12 else quarters(depth)
        self.out_blocks = check_blocks("out_blocks", default if out_blocks is None else out_blocks, depth)
        self.made_for = to_2tuple(img_size) if self.encoder.table_window else None
        self.encoder.keep_for_maps()
        self.finish()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, height, width), normalised -> one map (B, D, H, W) per block of `out_blocks`."""
        images = whole_patches(images, self.encoder.patch_size)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            return tuple(self.encoder.maps(images, self.out_blocks))


def whole_patches(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Images (B, 3, height, width), stretched to the next size that whole patches fill."""
    size = images.shape[-2:]
    sides = [math.ceil(side / patch) * patch for side, patch in zip(size, patch_size, strict=True)]
    return images if sides == list(size) else F.interpolate(images, sides, mode="bilinear", align_corners=False)


class FrozenViT(OnEncoder):
    """A frozen encoder: maps of its patch tokens after the final norm, as DINOv2's linear segmentation reads them.

    It is always in eval mode and computes without gradients. Images may be of any size, as for `PlainSegmentationViT`.

    Args:
        encoder: the description of the encoder; None for this suite's own ViT of the sizes below, or until the source
            of the weights gives it.
        img_size: side or (height, width) in pixels of the training crops, for which position tables are resampled.
        patch_size: side of a patch in pixels; the projection of other patches is resampled when weights are loaded.
            None for the encoder's own.
        last_blocks: number of last blocks whose maps are returned, each after the final norm.
        size: of this suite's own ViT, a name of `SIZES`; None for the encoder of the source of the weights.
        embed_dim: width of a token; None: that of `size`.
        depth: number of blocks; None: that of `size`.
        num_heads: heads of a block's attention; None: those of `size`.
        mlp_ratio: MLP width over `embed_dim`.
    """

    def __init__(
        self,
        encoder: Mapping[str, Any] | None = None,
        img_size: int | tuple[int, int] = 512,
        patch_size: int | None = 16,
        last_blocks: int = 1,
        size: str | None = None,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: float | None = None,
    ):
        sized = encoder is None and size is not None
        if sized:
            sizes = {"size": size, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
            encoder = {"family": "semaim", **sizes, "mlp_ratio": mlp_ratio}
        super().__init__(encoder, True, img_size=to_2tuple(img_size), patch_size=patch_size)
        self.sized = sized
        if not 1 <= last_blocks <= self.encoder.depth:
            raise UserError(f"last_blocks is {last_blocks}: the encoder has {self.encoder.depth} blocks")
        self.blocks = range(self.encoder.depth - last_blocks, self.encoder.depth)
        self.embed_dim = self.map_width(self.encoder)
        self.encoder.keep_for_pool("avg")
        self.finish()

    @staticmethod
    def map_width(encoder: Encoder) -> int:
        """See `OnEncoder.map_width`: SAM's neck, its final norm, is narrower than its blocks."""
        return encoder.width_of("avg")

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, height, width), normalised -> one map (B, D, H, W) per block, the last block's last."""
        return tuple(self.encoder.normed_maps(whole_patches(images, self.encoder.patch_size), self.blocks))
