"""The order in which the patches of an image are predicted: similarity -> centre -> key -> order.

Every order is a key per patch; the smaller key is predicted earlier, and equal keys are ranked by `draw`, one uniform
number per patch. All randomness enters through `draw`, so an order is a pure function, and a seed reproduces it.

Shapes: similarity and draw (B, L), keys (B, L), order int64 (B, L); `order[b, k]` is the patch predicted k-th;
grid is (rows, columns) with L = rows * columns, patch index = row * columns + column.

`docs/orders.md` maps the names to the flags of the official code, two of which look swapped.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from semaim.errors import nearest

Grid = tuple[int, int]

#: Half sides of the nested boxes on the 14 x 14 grid of the reference; they scale with the grid.
BOX_HALF_SIDES, BOX_GRID = (1, 3, 5), 14


def similarity_map(tokens: Tensor, source: str = "cls", scaling: str = "softmax") -> Tensor:
    """How much each patch looks like the whole image.

    Args:
        tokens: (B, 1 + L, D), class token first.
        source: compare the patches with the class token ("cls") or with the mean of the patches ("gap").
        scaling: "softmax" over the patches (the online encoder) or "minmax" to [0, 1] (teachers).

    Returns:
        (B, L) float32, also under autocast: scaled cosine similarity. Official code: models_semaim.py,
        `attention_type`.
    """
    with torch.autocast(tokens.device.type, enabled=False):  # its maximum is used: bf16 would make ties
        tokens = tokens.float()
        patches = tokens[:, 1:]
        whole = tokens[:, :1] if source == "cls" else patches.mean(dim=1, keepdim=True)
        cosine = F.cosine_similarity(whole, patches, dim=-1)
        if scaling == "softmax":
            return cosine.softmax(dim=-1)
        low, high = cosine.amin(-1, keepdim=True), cosine.amax(-1, keepdim=True)
        return (cosine - low) / (high - low + 1e-6)


def rows_and_columns(grid: Grid, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Row and column of every patch, int64 (L,) each."""
    index = torch.arange(grid[0] * grid[1], device=device)
    return index // grid[1], index % grid[1]


def distance_key(centre: Tensor, grid: Grid) -> Tensor:
    """Squared Euclidean distance on the grid from each image's centre patch: (B,) -> int64 (B, L).

    Squared, so that equal distances are equal integers; the square root would not change the order.
    """
    row, column = rows_and_columns(grid, centre.device)
    return (row - row[centre, None]) ** 2 + (column - column[centre, None]) ** 2


def box_key(centre: Tensor, grid: Grid) -> Tensor:
    """Minus the number of nested boxes around the centre patch that hold a patch: (B,) -> int64 (B, L), -3 innermost.

    A box of half side r spans [c - r, c + r), moved inward where it would leave the grid. On 14 x 14 the half sides
    are 1, 3 and 5, as in the reference; there, however, the boxes stop before the last row and column, and the
    innermost one misses its own centre if that is two patches from a border.
    """
    coordinates = rows_and_columns(grid, centre.device)
    centre_row = torch.div(centre, grid[1], rounding_mode="floor")
    return -box_counts((centre_row, centre % grid[1]), coordinates, grid)


def box_counts(
    centres: Sequence[Tensor],
    patches: Sequence[Tensor],
    limits: Grid,
    scale_of: Grid | None = None,
    half_sides: tuple[int, ...] = BOX_HALF_SIDES,
) -> Tensor:
    """The number of nested boxes around each centre that hold each patch.

    Args:
        centres, patches: rows and columns, int64 (B,) and (L,) each.
        limits: rows and columns that the boxes stay within.
        scale_of: the grid that sets the boxes' sizes; `limits` if None.
        half_sides: on the reference's grid.

    Returns:
        int64 (B, L), 0 to the number of boxes.
    """
    count = torch.zeros((), dtype=torch.int64, device=patches[0].device)
    for half_side in half_sides:
        inside = torch.ones((), dtype=torch.bool, device=patches[0].device)
        for centre, coordinate, limit, scale in zip(centres, patches, limits, scale_of or limits, strict=True):
            half = max(1, round(half_side * scale / BOX_GRID))
            side = min(2 * half, limit)
            start = (centre - half).clamp(0, limit - side)[:, None]
            inside = inside & (coordinate >= start) & (coordinate < start + side)
        count = count + inside.long()
    return count


def square_key(grid: Grid, device: torch.device | None = None) -> Tensor:
    """Minus the number of nested squares around the middle of the grid that hold a patch: int64 (L,), -3 innermost."""
    count = torch.zeros(grid[0] * grid[1], dtype=torch.int64, device=device)
    for half_side in BOX_HALF_SIDES:
        inside = torch.ones_like(count, dtype=torch.bool)
        for coordinate, side in zip(rows_and_columns(grid, device), grid, strict=True):
            inside &= (coordinate - (side - 1) / 2).abs() < half_side * side / BOX_GRID
        count += inside
    return -count


def _semantic(similarity: Tensor, grid: Grid, draw: Tensor) -> Tensor:
    return distance_key(similarity.argmax(dim=-1), grid)


def _similarity(similarity: Tensor, grid: Grid, draw: Tensor) -> Tensor:
    return -similarity


def _semantic_rings(similarity: Tensor, grid: Grid, draw: Tensor) -> Tensor:
    return box_key(similarity.argmax(dim=-1), grid)


def _raster(similarity: None, grid: Grid, draw: Tensor) -> Tensor:
    return torch.arange(draw.shape[1], device=draw.device).expand_as(draw)


def _snake(similarity: None, grid: Grid, draw: Tensor) -> Tensor:
    row, column = rows_and_columns(grid, draw.device)
    walked = torch.where(row % 2 == 0, column, grid[1] - 1 - column)
    return (row * grid[1] + walked).expand_as(draw)


def _stochastic(similarity: None, grid: Grid, draw: Tensor) -> Tensor:
    return draw


def _center_out(similarity: None, grid: Grid, draw: Tensor) -> Tensor:
    return square_key(grid, draw.device).expand_as(draw)


def _out_center(similarity: None, grid: Grid, draw: Tensor) -> Tensor:
    return -square_key(grid, draw.device).expand_as(draw)


def _stochastic_center(similarity: None, grid: Grid, draw: Tensor) -> Tensor:
    # The patch with the smallest draw is a uniformly random patch, and comes first in its own box.
    return box_key(draw.argmin(dim=-1), grid)


#: name -> key function of (similarity, grid, draw); the similarity is None for orders outside `SEMANTIC_ORDERS`.
ORDERS: dict[str, Callable[[Any, Grid, Tensor], Tensor]] = {
    "semantic": _semantic,
    "similarity": _similarity,
    "semantic_rings": _semantic_rings,
    "raster": _raster,
    "snake": _snake,
    "stochastic": _stochastic,
    "center_out": _center_out,
    "out_center": _out_center,
    "stochastic_center": _stochastic_center,
}

#: Orders that depend on the image; the others need no pass of the guide.
SEMANTIC_ORDERS = frozenset({"semantic", "similarity", "semantic_rings"})


def check_order(name: str) -> str:
    """The name itself; ValueError with the nearest names if there is no such order."""
    if name not in ORDERS:
        raise ValueError(f"unknown order {name!r}: {nearest(name, ORDERS)}")
    return name


def sort_keys(key: Tensor, draw: Tensor) -> Tensor:
    """Patches by rising key, equal keys by rising draw: (B, L), (B, L) -> order (B, L)."""
    by_draw = draw.argsort(dim=-1, stable=True)
    return by_draw.gather(1, key.gather(1, by_draw).argsort(dim=-1, stable=True))


def make_order(name: str, similarity: Tensor | None, grid: Grid, draw: Tensor) -> Tensor:
    """The order of a batch.

    Args:
        name: a key of `ORDERS`.
        similarity: (B, L); may be None for orders outside `SEMANTIC_ORDERS`.
        grid: (rows, columns).
        draw: (B, L) uniform in [0, 1).

    Returns:
        int64 (B, L), the patch predicted k-th at [b, k].
    """
    return sort_keys(ORDERS[check_order(name)](similarity, grid, draw), draw)
