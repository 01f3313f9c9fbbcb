"""Pictures of what a pretraining network does with images: order, attention, similarity, reconstruction.

A `Look` runs a network on images and returns columns; `draw_network` makes a picture of any look. A look requires of
a network only what it shows:

* all: `grid_of(size)`, and parameters on one device;
* order, reconstruction: `network(images, draw)` with a `prediction` (B, L, width), and an `order` (B, L) or a `mask`
  (B, L) that is 1 where a patch was removed; `target` and `patch_size`;
* attention: `forward_with_attention(images)`;
* comparison, similarity: `look(images)` -> tokens and similarity map, or else a `VisionTransformer`;
* components: a `VisionTransformer`, or else `encode(images)` -> tokens.

So these looks draw a new method if its output has such fields. For a custom picture, write a look from `columns`:

    def look_at_mine(network, images, draw, normaliser):
        seen = normaliser.normalise(images)
        output = network(seen, draw)
        rebuilt = predicted_pixels(network, seen, output.prediction, normaliser)
        return reconstruction_columns(images, output.mask, rebuilt, network.grid_of(images.shape[-2:]))

    draw_network(model, images, look=look_at_mine)
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from semaim.drawing.columns import (
    attention_columns,
    comparison_columns,
    component_columns,
    order_columns,
    prediction_columns,
    reconstruction_columns,
    similarity_columns,
)
from semaim.drawing.panels import Columns, lay_out
from semaim.errors import UserError
from semaim.models.ordering import Grid, similarity_map
from semaim.models.targets import PixelTarget
from semaim.models.vit import VisionTransformer, patchify, unpatchify

SOURCES = {"cls": "the class token", "gap": "the mean patch"}  #: what `network.similarity` compares patches with


class Network(Protocol):
    """An nn.Module that looks can draw. Few networks have all of this: the list above says which look needs what."""

    patch_size: tuple[int, int]
    target: PixelTarget

    def __call__(self, images: Tensor, draw: Tensor) -> Any:
        """One step's output: any object with some of the fields in the list above."""

    def grid_of(self, image_size: Sequence[int]) -> Grid:
        """(rows, columns) of patches of an image of (height, width) pixels."""

    def forward_with_attention(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, 1 + L, D), and the class token's attention on the patches (B, L)."""

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, 1 + L, width), and the similarity map (B, L)."""


class Normaliser(Protocol):
    """Normalises images by a model's mean and standard deviation."""

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> normalised floats."""

    def denormalise(self, images: Tensor) -> Tensor:
        """Normalised (B, 3, H, W) -> floats in [0, 1]."""


class Model(Protocol):
    """A network with its normalisation and precision, as `semaim.engine.pretraining.Pretraining` is."""

    network: nn.Module
    data_preprocessor: Normaliser

    def autocast(self, device: torch.device) -> torch.autocast:
        """The precision of its forward pass."""


#: (network, images uint8 (B, 3, H, W), draw (B, L) of uniform numbers, normaliser) -> columns, all on one device.
Look = Callable[[Network, Tensor, Tensor, Normaliser], Columns]


def draw_network(model: Model, images: Tensor, title: str = "", across: bool = False, *, look: Look) -> Image.Image:
    """A picture of what a network does with images: deterministic, and without gradient.

    Args:
        model: its network's training or eval mode is restored.
        images: uint8 (B, 3, H, W), on any device.
        title: text above the panels.
        across: one column per image instead of one row.
        look: what to show.
    """
    with inference(model) as (network, device):
        rows, columns = network.grid_of(images.shape[-2:])
        draw = torch.rand(len(images), rows * columns, generator=torch.Generator().manual_seed(0)).to(device)
        shown = look(network, images.to(device), draw, model.data_preprocessor)
    return lay_out(shown, title, across)


@contextmanager
def inference(model: Model) -> Iterator[tuple[Network, torch.device]]:
    """The model's network in eval mode, without gradient and in the model's precision, and its device."""
    network = model.network
    device = next(network.parameters()).device
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        with torch.no_grad(), model.autocast(device):
            yield cast(Network, network), device  # nn.Module does not declare a network's further methods
    finally:
        for module in training:
            module.training = True


# Looks


def look_at_order(network: Network, images: Tensor, draw: Tensor, normaliser: Normaliser) -> Columns:
    """Image, similarity map if the order uses one, order, and with pixel targets the reconstruction.

    Every patch is predicted from the true patches before it. It is drawn with the true patch's mean and variance, which
    normalised targets do not contain. `UserError` if the network does not predict in an order.
    """
    seen = normaliser.normalise(images)
    output = network(seen, draw)
    if not hasattr(output, "order"):
        raise UserError(f"{type(network).__name__} predicts in no order: look at its reconstruction")
    pixels = predicts_pixels(network)
    rebuilt = predicted_pixels(network, seen, output.prediction, normaliser) if pixels else None
    grid = network.grid_of(images.shape[-2:])
    return order_columns(images, output.similarity, output.order, grid, rebuilt)


def look_at_comparison(network: Network, images: Tensor, draw: Tensor, normaliser: Normaliser) -> Columns:
    """The orders `columns.COMPARED` of the same images; the last two use this network's similarity map."""
    similarity = similarities(network, normaliser.normalise(images))[0]
    return comparison_columns(images, similarity, network.grid_of(images.shape[-2:]), draw)


def look_at_attention(network: Network, images: Tensor, draw: Tensor, normaliser: Normaliser) -> Columns:
    """The class token's attention on the patches in the encoder's last block, mean over heads."""
    attention = network.forward_with_attention(normaliser.normalise(images))[1]
    return attention_columns(images, attention, network.grid_of(images.shape[-2:]))


def look_at_similarity(network: Network, images: Tensor, draw: Tensor, normaliser: Normaliser) -> Columns:
    """Similarity of the patches to the class token, whose maximum is the centre of the order, and to the centre."""
    similarity, centre, to_centre = similarities(network, normaliser.normalise(images))
    source = getattr(network, "similarity", "cls")
    compared = f"similarity to\n{SOURCES[source]}" if source in SOURCES else "attention of\nthe class token"
    grid = network.grid_of(images.shape[-2:])
    return similarity_columns(images, similarity, to_centre, centre, grid, compared)


def look_at_components(network: Network, images: Tensor, draw: Tensor, normaliser: Normaliser) -> Columns:
    """Image and principal components of its patches; with an order also the similarity map and the order."""
    seen, grid = normaliser.normalise(images), network.grid_of(images.shape[-2:])
    output = network(seen, draw)
    ordered = order_columns(images, output.similarity, output.order, grid) if hasattr(output, "order") else {}
    return component_columns(images, encoded(network, seen)[:, 1:], grid) | ordered


def look_at_reconstruction(network: Network, images: Tensor, draw: Tensor, normaliser: Normaliser) -> Columns:
    """The predicted pixels: of the removed patches if the network removes some, else of all, with their order.

    `UserError` if the network does not predict pixels.
    """
    if not predicts_pixels(network):
        what = "this run predicts features, not pixels" if hasattr(network, "target") else "this is no pretraining"
        raise UserError(f"{what}: there is nothing to rebuild")
    seen, grid = normaliser.normalise(images), network.grid_of(images.shape[-2:])
    output = network(seen, draw)
    rebuilt = predicted_pixels(network, seen, output.prediction, normaliser)
    if hasattr(output, "mask"):
        return reconstruction_columns(images, output.mask, rebuilt, grid)
    return prediction_columns(images, rebuilt, getattr(output, "order", None), grid)


# Pictures of these looks, with the arguments of `draw_network`: (model, images, title, across)

draw_orders = partial(draw_network, look=look_at_order)
draw_comparison = partial(draw_network, look=look_at_comparison)
draw_attention = partial(draw_network, look=look_at_attention)
draw_similarity = partial(draw_network, look=look_at_similarity)
draw_components = partial(draw_network, look=look_at_components)
draw_reconstruction = partial(draw_network, look=look_at_reconstruction)

#: `Method.picture` -> the function that draws it.
DRAWN = {"order": draw_orders, "reconstruction": draw_reconstruction}


# Helpers of looks


def similarities(network: Network, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities of patches.

    Args:
        network: its own `look` is used if it has one, else the class token of a plain encoder.
        seen: normalised images (B, 3, H, W).

    Returns:
        similarity: (B, L), from which orders are made.
        centre: int64 (B,), the patch with the highest similarity.
        to_centre: (B, L), cosine similarity to the centre's token.
    """
    if hasattr(network, "look"):
        tokens, similarity = network.look(seen)
    else:
        tokens = encoded(network, seen)
        similarity = similarity_map(tokens)
    centre, patches = similarity.argmax(dim=-1), tokens[:, 1:].float()
    return similarity, centre, F.cosine_similarity(patches[torch.arange(len(seen)), centre, None], patches, dim=-1)


def encoded(network: Network, seen: Tensor) -> Tensor:
    """The encoder's tokens (B, 1 + L, D), after the final norm, of normalised images."""
    if isinstance(network, VisionTransformer):
        return VisionTransformer.forward(network, seen)  # the network's own forward is its training step
    if hasattr(network, "encode"):
        return network.encode(seen)
    raise UserError(f"{type(network).__name__} is no VisionTransformer and has no `look` or `encode`: nothing to draw")


def predicts_pixels(network: Network) -> bool:
    """Whether its target is pixels, which can be drawn."""
    return hasattr(getattr(network, "target", None), "norm_pix")


def predicted_pixels(network: Network, seen: Tensor, prediction: Tensor, normaliser: Normaliser) -> Tensor:
    """Predicted patches (B, L, width) of normalised images `seen` as floats in [0, 1] on the CPU (B, 3, H, W)."""
    return normaliser.denormalise(reconstruct(network, seen, prediction.float())).cpu()


def reconstruct(network: Network, images: Tensor, prediction: Tensor) -> Tensor:
    """Predicted patches as images, given the true mean and variance of each patch where the target normalises them.

    Args:
        network: has `target.norm_pix`, `patch_size` and `grid_of`.
        images: the true ones (B, 3, H, W), normalised.
        prediction: (B, L, width).

    Returns:
        Normalised images (B, 3, H, W).
    """
    if network.target.norm_pix:
        variance, mean = torch.var_mean(patchify(images, network.patch_size), dim=-1, keepdim=True)
        prediction = prediction * (variance + 1e-6).sqrt() + mean
    return unpatchify(prediction, network.patch_size, network.grid_of(images.shape[-2:]))
