"""Attention within windows, for the blocks of any encoder: only the products of queries and keys change.

A block's own code computes queries, keys and values of all tokens, with its norms, biases and rotary positions, so that
each patch has its true place. `Windows` then replaces the one call of PyTorch's attention: a patch attends to the
patches of its window and to the prefix tokens; a prefix token attends to everything, as in the encoder itself.

Shapes: B images, n heads, P prefix tokens, H x W patches row by row, N = P + H * W, d channels of a head.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

#: Whether patches see the prefix tokens: as in the encoder, or not at all, as ViTDet without a class token.
PREFIXES = ("seen", "dropped")

attention = F.scaled_dot_product_attention


@dataclass
class Geometry:
    """What the windows of a forward pass depend on; shared by all blocks of an encoder.

    Attributes:
        prefix: number of prefix tokens.
        seen: whether patches attend to them.
        grid: (rows, columns) of patches of the images in the forward pass.
    """

    prefix: int
    seen: bool = True
    grid: tuple[int, int] = (0, 0)


def spans(side: int, window: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, width) of runs of equal windows along an axis: whole ones, then the rest; no padding."""
    whole = side // window * window
    if whole:
        yield 0, whole, window
    if whole < side:
        yield whole, side, side - whole


class Windows(TorchFunctionMode):
    """Context in which PyTorch's attention over N tokens is restricted to windows.

    Args:
        geometry: of the forward pass.
        window: side of the windows in patches; 0 for the whole map.
        tables: a bias is that of one window, which all windows share, not of all tokens.

    Attributes:
        calls: number of attentions restricted so far.
    """

    def __init__(self, geometry: Geometry, window: int, tables: bool = False):
        super().__init__()
        self.geometry, self.window, self.tables, self.calls = geometry, window, tables, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Replace attention; leave everything else as it is."""
        if func is attention:
            self.calls += 1
            return self.attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """(B, n, N, d) each -> (B, n, N, d).

        Args:
            query, key, value: of all tokens, in the order prefix, patches.
            attn_mask: None, or a bias added to the logits: for all tokens (..., N, N), or with `tables` for the prefix
                and one window (..., P + window^2, P + window^2), as relative position tables of windows give it.
            **options: of PyTorch's attention.
        """
        prefix, (height, width) = self.geometry.prefix, self.geometry.grid
        if query.shape[2] != prefix + height * width or options.get("is_causal"):
            raise ValueError(f"windows: {query.shape[2]} tokens, not {prefix} + {height} x {width}, or a causal mask")
        window = self.window or max(height, width)
        parts = [tensor[:, :, prefix:].unflatten(2, (height, width)) for tensor in (query, key, value)]
        rows = []
        for down in spans(height, window):
            row = []
            for across in spans(width, window):
                (top, bottom, tall), (left, right, wide) = down, across
                q, k, v = (_cut(part[:, :, top:bottom, left:right], tall, wide) for part in parts)
                if prefix and self.geometry.seen:
                    k, v = (
                        torch.cat([_repeat(whole[:, :, :prefix], len(own)), own], dim=2)
                        for whole, own in ((key, k), (value, v))
                    )
                bias = self._window_bias(attn_mask, down, across, len(query))
                found = attention(q, k, v, bias, **options)
                row.append(_join(found, len(query), (bottom - top) // tall, tall, wide))
            rows.append(torch.cat(row, dim=3))
        patches = torch.cat(rows, dim=2).flatten(2, 3)
        if not prefix:
            return patches
        if not self.geometry.seen:  # nothing reads them
            return torch.cat([torch.zeros_like(patches[:, :, :prefix]), patches], dim=2)
        bias = self._prefix_bias(attn_mask, query.shape[2])
        return torch.cat([attention(query[:, :, :prefix], key, value, bias, **options), patches], dim=2)

    def _prefix_bias(self, bias: Tensor | None, tokens: int) -> Tensor | None:
        """The bias of the prefix tokens' queries, (..., P, N)."""
        prefix = self.geometry.prefix
        if bias is None or not self.tables:
            return None if bias is None else bias[..., :prefix, :]
        # A table of relative positions has one value for all patches that a prefix token looks at.
        patches = bias[..., :prefix, prefix : prefix + 1].expand(*bias.shape[:-2], prefix, tokens - prefix)
        return torch.cat([bias[..., :prefix, :prefix], patches], dim=-1)

    def _window_bias(
        self, bias: Tensor | None, rows: tuple[int, int, int], columns: tuple[int, int, int], images: int
    ) -> Tensor | None:
        """The bias of the windows in an area, for each window of each image: (B * windows, n, patches, keys)."""
        if bias is None:
            return None
        prefix, (height, width) = self.geometry.prefix, self.geometry.grid
        seen = torch.arange(prefix if self.geometry.seen else 0, device=bias.device)
        (top, bottom, tall), (left, right, wide) = rows, columns
        expected = prefix + (self.window**2 if self.tables else height * width)
        if bias.shape[-1] != expected:
            raise ValueError(f"windows of {self.window}: a bias for {bias.shape[-1]} tokens, not {expected}")
        place = torch.arange(expected - prefix, device=bias.device)
        if self.tables:  # the same offsets in every window
            own = prefix + place.view(self.window, self.window)[:tall, :wide].reshape(1, -1)
            own = own.expand((bottom - top) // tall * ((right - left) // wide), -1)
        else:
            place = place.view(1, 1, height, width, 1)[:, :, top:bottom, left:right]
            own = prefix + _cut(place, tall, wide)[:, 0, :, 0]  # (windows, patches)
        keys = torch.cat([seen.expand(len(own), -1), own], dim=1)
        bias = bias.expand(1, *bias.shape[-3:])[0] if bias.ndim == 4 else bias  # (n, tokens, tokens)
        return bias[:, own[:, :, None], keys[:, None, :]].transpose(0, 1).repeat(images, 1, 1, 1)


def _cut(maps: Tensor, tall: int, wide: int) -> Tensor:
    """Maps (B, n, H, W, d) of whole windows -> (B * windows, n, tall * wide, d), the windows row by row."""
    parts = maps.unflatten(3, (-1, wide)).unflatten(2, (-1, tall))  # (B, n, rows, tall, columns, wide, d)
    return parts.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5).flatten(0, 2)


def _join(windows: Tensor, images: int, rows: int, tall: int, wide: int) -> Tensor:
    """Inverse of `_cut`: (B * windows, n, tall * wide, d) -> (B, n, H, W, d)."""
    parts = windows.unflatten(0, (images, rows, -1)).unflatten(4, (tall, wide))  # (B, rows, columns, n, tall, wide, d)
    return parts.permute(0, 3, 1, 4, 2, 5, 6).flatten(4, 5).flatten(2, 3)


def _repeat(prefix: Tensor, windows: int) -> Tensor:
    """Prefix tokens (B, n, P, d) for each window of each image: (windows of all images, n, P, d)."""
    return prefix.repeat_interleave(windows // len(prefix), dim=0)


class _Restrict:
    """Hooks that put a block's forward pass inside `Windows`."""

    def __init__(self, geometry: Geometry, window: int, name: str, tables: bool):
        self.geometry, self.window, self.name, self.tables = geometry, window, name, tables
        self.active: list[Windows] = []

    def before(self, *unused: Any) -> None:
        """Enter."""
        self.active.append(Windows(self.geometry, self.window, self.tables))
        self.active[-1].__enter__()

    def after(self, *unused: Any) -> None:
        """Leave."""
        mode = self.active.pop()
        mode.__exit__(None, None, None)
        if not mode.calls:
            raise RuntimeError(f"{self.name} does not use PyTorch's attention, which windows need")


def restrict(block: nn.Module, geometry: Geometry, window: int, name: str, tables: bool = False) -> None:
    """Restrict a block's attention to windows, in every later call, also when activations are recomputed.

    Args:
        block: any block whose attention calls PyTorch's `scaled_dot_product_attention`.
        geometry: its `grid` must be set before each forward pass.
        window: side of the windows in patches; 0 for the whole map.
        name: of the block, for messages.
        tables: the block's biases are those of one window, see `Encoder.restrict_tables`.
    """
    for module in block.modules():
        if hasattr(module, "fused_attn"):  # timm's own products would not be seen
            setattr(module, "fused_attn", True)  # noqa: B010
    hook = _Restrict(geometry, window, name, tables)
    block.register_forward_pre_hook(hook.before)
    block.register_forward_hook(hook.after, always_call=True)
