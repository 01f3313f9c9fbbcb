"""Columns of pictures for `panels.lay_out` that show what a pretraining method does, made from tensors alone.

None of these functions needs a network: they take the images, uint8 (B, 3, H, W), and the network's results, on any
device. A grid is (rows, columns) of patches, L their number; patches are in image order, row by row. Predicted pixels
are floats in [0, 1], (B, 3, H, W), as `encoder.predicted_pixels` returns them.
"""

import torch
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


def component_columns(images: Tensor, patches: Tensor, grid: Grid) -> Columns:
    """Image, and the first three principal components of its patch tokens (B, L, D) as red, green and blue."""
    colours = components_of(patches).float().unflatten(1, grid).permute(0, 3, 1, 2)
    return {"image": image_panels(images), "principal\ncomponents": image_panels(colours)}


def components_of(patches: Tensor) -> Tensor:
    """The first three principal components of all patches of all images, as colours: (B, L, D) -> (B, L, 3), float64.

    The components are those of the B * L tokens together, so that a colour means the same in every image. The sign of
    each is such that the largest coordinate of its direction, by magnitude, is positive; its value is 1/2 at the mean,
    and 0 and 1 at two standard deviations below and above it, where it is cut off. A component without variance is
    1/2 everywhere.
    """
    tokens = patches.double().cpu().flatten(0, 1)
    tokens = tokens - tokens.mean(dim=0)
    # Eigenvectors of the covariance: as by the singular value decomposition, in the time of D x D.
    variances, directions = torch.linalg.eigh(tokens.T @ tokens / len(tokens))
    values = torch.full((len(tokens), 3), 0.5, dtype=torch.float64)
    for place in range(min(3, len(variances))):
        direction, variance = directions[:, -1 - place], variances[-1 - place]
        if variance > 1e-12 * variances[-1]:
            direction = direction * direction[direction.abs().argmax()].sign()
            values[:, place] += tokens @ direction / (4 * variance.sqrt())
    return values.clamp(0, 1).unflatten(0, patches.shape[:2])


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
