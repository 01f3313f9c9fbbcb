"""Columns of pictures for `panels.lay_out` that show what a pretraining method does, made from tensors alone.

None of these functions needs a network: they take the images, uint8 (B, 3, H, W), and the network's results, on any
device. A grid is (rows, columns) of patches, L their number; patches are in image order, row by row. Predicted pixels
are floats in [0, 1], (B, 3, H, W), as `encoder.predicted_pixels` returns them.
"""

from torch import Tensor

from semaim.drawing.panels import Columns, image_panels, lit_image_panels, map_panels, order_panels
from semaim.models.ordering import Grid, make_order

COMPARED = ("raster", "stochastic", "similarity", "semantic")  #: orders drawn side by side, as in the paper


def order_columns(
    images: Tensor, similarity: Tensor | None, order: Tensor, grid: Grid, rebuilt: Tensor | None = None
) -> Columns:
    """For a method that predicts patches in an order: image, similarity map, order, reconstruction.

    Args:
        images: uint8 (B, 3, H, W).
        similarity: (B, L), from which the order is made; None leaves the column out.
        order: int64 (B, L), the patch predicted k-th.
        grid: (rows, columns) of patches.
        rebuilt: predicted pixels (B, 3, H, W) in [0, 1]; None leaves the column out.
    """
    columns = {"image": image_panels(images)}
    if similarity is not None:
        columns["similarity"] = map_panels(similarity, grid)
    columns["order"] = order_panels(order, grid)
    if rebuilt is not None:
        columns["reconstruction"] = image_panels(rebuilt)
    return columns


def prediction_columns(
    images: Tensor, rebuilt: Tensor, order: Tensor | None = None, grid: Grid | None = None
) -> Columns:
    """For a method that predicts every patch: image, order if given, prediction.

    Args:
        images: uint8 (B, 3, H, W).
        rebuilt: predicted pixels (B, 3, H, W) in [0, 1].
        order: int64 (B, L), the patch predicted k-th; None leaves the column out.
        grid: (rows, columns) of patches; needed with an order.
    """
    columns = {"image": image_panels(images)}
    if order is not None:
        assert grid is not None, "an order needs a grid"
        columns["order"] = order_panels(order, grid)
    return {**columns, "prediction": image_panels(rebuilt)}


def reconstruction_columns(images: Tensor, masked: Tensor, rebuilt: Tensor, grid: Grid) -> Columns:
    """For a method that predicts removed patches: image, what it sees, reconstruction.

    Removed patches are grey in what it sees, and predicted in the reconstruction. The others are copied from the image
    in both: they have no loss, so predictions there mean nothing.

    Args:
        images: uint8 (B, 3, H, W).
        masked: (B, L), 1 or True where a patch was removed.
        rebuilt: predicted pixels (B, 3, H, W) in [0, 1].
        grid: (rows, columns) of patches.
    """
    height, width = images.shape[-2] // grid[0], images.shape[-1] // grid[1]
    removed = masked.float().view(-1, 1, *grid).repeat_interleave(height, 2).repeat_interleave(width, 3).cpu()
    shown, rebuilt = images.cpu() / 255, rebuilt.cpu()
    return {
        "image": image_panels(images),
        "what it sees": image_panels(shown * (1 - removed) + 0.5 * removed),
        "reconstruction": image_panels(shown * (1 - removed) + rebuilt * removed),
    }


def comparison_columns(images: Tensor, similarity: Tensor, grid: Grid, draw: Tensor) -> Columns:
    """The orders `COMPARED` of the same images; the last two use the same similarity map.

    Args:
        images: uint8 (B, 3, H, W).
        similarity: (B, L).
        grid: (rows, columns) of patches.
        draw: (B, L) uniform numbers, on the similarity's device.
    """
    columns = {"image": image_panels(images)}
    return columns | {name: order_panels(make_order(name, similarity, grid, draw), grid) for name in COMPARED}


def attention_columns(images: Tensor, attention: Tensor, grid: Grid) -> Columns:
    """Image, attention on its patches (B, L), and the image darkened where that is low."""
    return {
        "image": image_panels(images),
        "attention": map_panels(attention, grid),
        "image, lit by it": lit_image_panels(images, attention, grid),
    }


def similarity_columns(
    images: Tensor, similarity: Tensor, to_centre: Tensor, centre: Tensor, grid: Grid, compared: str
) -> Columns:
    """Image, similarity map, similarity to the centre, and the image darkened where the first map is low.

    Args:
        images: uint8 (B, 3, H, W).
        similarity: (B, L), from which orders are made.
        to_centre: (B, L), similarity to the centre's token.
        centre: int64 (B,), the patch with the highest similarity, marked by a cross.
        grid: (rows, columns) of patches.
        compared: name of the first map's column.
    """
    return {
        "image": image_panels(images),
        compared: map_panels(similarity, grid, marked=centre),
        "similarity to\nthe centre": map_panels(to_centre, grid, marked=centre),
        "image, lit by\nthe first": lit_image_panels(images, similarity, grid),
    }
