"""Panels in rows and columns: one row per image, one column per view of it."""

import io
from collections.abc import Callable
from functools import partial

import numpy as np
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from semaim.models.ordering import Grid

Panel = Callable[[Axes], object]  #: draws one cell
Columns = dict[str, list[Panel]]  #: name of a column -> its panels, one for each image


def render(figure: Figure) -> Image.Image:
    """A matplotlib figure as an RGB image, 100 pixels per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    return Image.open(buffer).convert("RGB")


def lay_out(columns: Columns, title: str = "", across: bool = False) -> Image.Image:
    """Panels under the names of their columns, one row per image.

    Args:
        columns: each with the same number of panels.
        title: text above them.
        across: transposed: one column per image, the names to the left of the rows.
    """
    side, rows, names = 1.6, len(next(iter(columns.values()))), len(columns)
    lines = max(name.count("\n") for name in columns)
    if across:
        figure = Figure(figsize=(side * rows + 0.3 + 0.15 * lines, side * names + 0.3), layout="constrained")
        axes = figure.subplots(names, rows, squeeze=False).T
    else:
        figure = Figure(figsize=(side * names, side * rows + 0.5 + 0.15 * lines), layout="constrained")
        axes = figure.subplots(rows, names, squeeze=False)
    figure.suptitle(title, fontsize=10)
    for place, (name, panels) in enumerate(columns.items()):
        first = axes[0, place]
        if across:
            first.text(-0.06, 0.5, name, size=9, rotation=90, ha="right", va="center", transform=first.transAxes)
        else:
            first.set_title(name, fontsize=9)
        for axis, panel in zip(axes[:, place], panels, strict=True):
            axis.set_axis_off()
            panel(axis)
    return render(figure)


def image_panels(images: Tensor) -> list[Panel]:
    """Images (B, 3, H, W), uint8 or floats in [0, 1]."""

    def draw(image: np.ndarray, axis: Axes) -> None:
        axis.imshow(image)

    return [partial(draw, image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]


def map_panels(values: Tensor, grid: Grid, colours: str = "viridis", marked: Tensor | None = None) -> list[Panel]:
    """One number per patch as a colour.

    Args:
        values: (B, L), L = rows * columns of the grid.
        grid: (rows, columns).
        colours: a colour map of matplotlib's.
        marked: int64 (B,), the patch of each image that is marked by a cross.
    """

    def draw(row: int, axis: Axes) -> None:
        axis.imshow(values[row].view(grid).float().cpu().numpy(), cmap=colours)
        if marked is not None:
            y, x = divmod(int(marked[row]), grid[1])
            axis.plot(x, y, "+", color="black", markersize=7)

    return [partial(draw, row) for row in range(len(values))]


def lit_image_panels(images: Tensor, values: Tensor, grid: Grid) -> list[Panel]:
    """Images uint8 (B, 3, H, W), darkened where the values per patch (B, L) are low."""
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    light = ((values - low) / (high - low + 1e-12)).sqrt().view(-1, 1, *grid).float().cpu()
    light = F.interpolate(light, images.shape[-2:], mode="bilinear").clamp(0, 1)
    return image_panels(images.cpu() / 255 * (0.15 + 0.85 * light))


def order_panels(order: Tensor, grid: Grid) -> list[Panel]:
    """Orders int64 (B, L), from the first patch (bright) to the last (dark), with a cross on the first."""
    return map_panels(-order.argsort(dim=-1), grid, "magma", order[:, 0])
