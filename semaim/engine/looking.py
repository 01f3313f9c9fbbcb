"""What pictures are drawn of: a pretraining checkpoint with its method, or any other encoder."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from semaim import checkpoints
from semaim.checkpoints.files import FORMAT, read_checkpoint
from semaim.engine.feature_files import prepare
from semaim.engine.network import NormaliseImages
from semaim.engine.precision import autocast
from semaim.engine.pretraining import model_from_checkpoint
from semaim.errors import UserError
from semaim.models.ordering import make_order, similarity_map
from semaim.places import is_name


class Looked(nn.Module):
    """An encoder as the looks of `semaim.drawing.encoder` ask for: with the semantic order of its similarity map.

    Patches are compared with the class token, without one with their mean.
    """

    def __init__(self, encoder: Any):
        super().__init__()
        self.encoder = encoder
        self.patch_size, self.grid_of = encoder.patch_size, encoder.grid_of
        self.similarity = "cls" if encoder.has_class_token else "gap"

    def encode(self, images: Tensor) -> Tensor:
        """Images, normalised -> tokens (B, 1 + L, D), after the final norm; the first is any without a class token."""
        tokens, prefix = self.encoder(images), self.encoder.num_prefix_tokens
        return torch.cat([tokens[:, :1], tokens[:, prefix:]], dim=1)

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, 1 + L, D), and the similarity map (B, L)."""
        tokens = self.encode(images)
        return tokens, similarity_map(tokens, self.similarity)

    def forward(self, images: Tensor, draw: Tensor) -> SimpleNamespace:
        """The order (B, L) in which pretraining would predict, and its similarity map (B, L)."""
        similarity = self.look(images)[1]
        order = make_order("semantic", similarity, self.grid_of(images.shape[-2:]), draw)
        return SimpleNamespace(order=order, similarity=similarity, prediction=None)

    def forward_with_attention(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens, and the class token's attention in the last block; `UserError` if the encoder does not give it."""
        if not hasattr(self.encoder, "forward_with_attention"):
            raise UserError(f"the attention of {self.encoder.title} is not known: it is of this suite's own ViT alone")
        return self.encoder.forward_with_attention(images)


@dataclass
class LookedModel:
    """A `semaim.drawing.encoder.Model`: the network in fp32."""

    network: Looked
    data_preprocessor: NormaliseImages

    def autocast(self, device: torch.device) -> torch.autocast:
        """The precision of its forward pass."""
        return autocast(device, "fp32")


def pretraining_in(source: str) -> dict | None:
    """The content of a pretraining's checkpoint; None for any other source of an encoder."""
    if is_name(source):
        return None
    content = checkpoints.read_file(source)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return None
    config = content.get("config")
    model = config.get("model") if isinstance(config, dict) else None
    pretrains = isinstance(model, dict) and model.get("type") == "Pretraining"
    return read_checkpoint(source) if pretrains else None


def model_to_draw(
    source: str, arch: str | None = None, size: int | None = None, options: dict | None = None
) -> tuple[Any, int, str]:
    """A model for `semaim.drawing.encoder`, the side of its images in pixels, and a title.

    Args:
        source: a pretraining's checkpoint, or any other source of an encoder.
        arch: timm's name of the architecture in a file that does not tell it.
        size: side of the images; None for the encoder's own.
        options: changes to a pretraining's config.
    """
    checkpoint = pretraining_in(source) if arch is None else None
    name = source.rstrip("/").rpartition("/")[2]
    if checkpoint is not None:
        model = model_from_checkpoint(checkpoint, options)
        own = checkpoint["config"]["model"]["network"].get("img_size", 224)
        return model, size or own, f"{name}, epoch {checkpoint['epoch']}"
    if options:
        raise UserError(f"--cfg-options is for a pretraining's checkpoint, which {source} is not")
    prepared = prepare(source, arch, size)
    statistics = NormaliseImages(prepared.mean, prepared.std)
    return LookedModel(Looked(prepared.encoder), statistics), prepared.size, name
