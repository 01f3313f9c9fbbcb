"""What every task asks of an encoder: `Encoder`, and the registry of its families.

A family is a subclass in a file of its own: `own.py` for this suite's ViT, `timm_vit.py` for timm's. Another one is
registered in `FAMILIES` by a module that the config names in `custom_imports`; nothing else changes.

Shapes: B images, P prefix tokens (class token, registers), L patches row by row, D channels.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import timm
import torch
from mmengine.registry import Registry
from torch import Tensor, nn

from semaim.checkpoints import Checkpoint, LoadReport
from semaim.errors import UserError, nearest

if TYPE_CHECKING:
    from semaim.encoders.images import Preparation

#: How tokens after the final norm become one vector.
POOLS = {"cls": "class token", "avg": "mean of the patches", "native": "the model's own pooling"}

FAMILIES = Registry("encoder", scope="semaim", locations=["semaim.encoders"])


@dataclass
class Source:
    """An encoder's weights, and what else their source says; `sources.open_source` finds it.

    Attributes:
        name: as the user wrote it.
        path: of the weights.
        layout: whose names the tensors have, in words.
        description: of the encoder, for `build`.
        preparation: of its images.
        state: tensors for the encoder's family.
        left: names of tensors that are no part of the encoder, and are not read.
        size: (height, width) in pixels of the position tables in `state`.
        checkpoint: of this suite's own ViT, as `checkpoints.read` returns it; None for others.
    """

    name: str
    path: Path
    layout: str
    description: dict
    preparation: "Preparation"
    state: dict[str, Tensor] = field(repr=False)
    left: list[str]
    size: tuple[int, int]
    checkpoint: Checkpoint | None = None

    def build(self, **changes: Any) -> "Encoder":
        """The encoder with random weights; its tables have the source's size, unless `changes` say otherwise."""
        return build(self.description, **{"img_size": self.size, **changes})


class Encoder(nn.Module):
    """A plain ViT: images (B, 3, H, W), normalised -> tokens after the final norm (B, P + L, D).

    Attributes:
        embed_dim, depth: D, and the number of blocks.
        patch_size: (height, width) of a patch in pixels.
        img_size: (height, width) in pixels that its position tables are made for.
        num_prefix_tokens: P.
        blocks: the blocks, in order. Each is called once per forward pass, so hooks on them see every block.
        description: plain values from which `build` makes the same network; a run's checkpoint keeps them.
        mean, std, report: of the source, where `semaim.load_encoder` has loaded it: statistics of pixels from 0 to 1,
            and which tensors were loaded.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    report: LoadReport

    family: ClassVar[str]
    embed_dim: int
    depth: int
    patch_size: tuple[int, int]
    img_size: tuple[int, int]
    num_prefix_tokens: int
    blocks: Any  #: iterable of modules
    description: dict

    #: Whether its blocks attend within windows of their own, as SAM's: detectors leave its attention as it is.
    windowed_itself: ClassVar[bool] = False

    #: Whether its tables are built for `img_size`; else they keep the size that the description's `args` give.
    resizes: ClassVar[bool] = True

    # What a family provides

    @classmethod
    def knows(cls, arch: str) -> bool:
        """Whether an architecture of this name, as `--arch` and files give it, belongs to the family."""
        return False

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised -> tokens after the final norm (B, P + L, D)."""
        raise NotImplementedError

    def maps(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """The maps (B, D, H', W') of some blocks, by rising index, before the final norm."""
        raise NotImplementedError

    def normed_maps(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """As `maps`, but after the final norm; here only of the last block, whose map the tokens of `forward` are."""
        if list(blocks) != [self.depth - 1]:
            raise UserError(f"{self.title} gives the normed map of its last block alone: set last_blocks to 1")
        patches = self(images)[:, self.num_prefix_tokens :]
        return [patches.transpose(1, 2).unflatten(2, self.grid_of(images.shape[-2:])).contiguous()]

    def load(self, source: Source) -> LoadReport:
        """Load a source's weights; `UserError` that names any tensor which is missing, not read, or of another shape.

        On the meta device it is only checked.
        """
        raise NotImplementedError

    def native(self, tokens: Tensor) -> Tensor:
        """The model's own pooling of the tokens (B, P + L, D) -> (B, D'); `UserError` if it has none."""
        raise UserError(f"pool=native: {self.title} has no pooling of its own: choose cls or avg")

    @classmethod
    def own_size(cls, arch: str) -> tuple[int, int]:
        """(height, width) in pixels that an architecture of the family is made for."""
        return 224, 224

    @property
    def has_class_token(self) -> bool:
        """Whether the first prefix token is a class token."""
        return self.num_prefix_tokens > 0

    @property
    def title(self) -> str:
        """The name of the architecture, for the log and for tables."""
        raise NotImplementedError

    def get_layer_depth(self, name: str) -> tuple[int, int]:
        """The layer of a parameter for layer-wise learning rates, and the number of layers; 0 is the embedding."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, besides one-dimensional ones."""
        return set()

    def keep_for_maps(self) -> None:
        """Remove what maps do not read, such as the final norm: every parameter left gets a gradient."""
        raise NotImplementedError

    def keep_for_pool(self, pool: str) -> None:
        """Remove what this pooling does not read."""
        raise NotImplementedError

    @property
    def table_window(self) -> int | None:
        """Side in patches that its tables of relative positions were made for in pretraining; None without tables."""
        return None

    def restrict_tables(self, block: int, window: int) -> None:
        """Give the table of relative positions of a block that attends within windows the size of a window."""

    def at_size(self, size: tuple[int, int]) -> "Encoder":
        """The encoder for images of (height, width) pixels: itself if its tables are resampled in the forward pass."""
        return self

    # What follows from it

    def grid_of(self, image_size: Sequence[int]) -> tuple[int, int]:
        """(rows, columns) of patches of an image of (height, width) pixels; `UserError` if they do not fill it."""
        (height, width), (patch_height, patch_width) = image_size, self.patch_size
        if height < patch_height or width < patch_width or height % patch_height or width % patch_width:
            raise UserError(
                f"an image of {height} x {width} pixels is no whole number of {patch_height} x {patch_width} patches:"
                " resize or crop it"
            )
        return height // patch_height, width // patch_width

    def check_images(self, images: Tensor) -> None:
        """`UserError` for anything but a batch of float images (B, 3, H, W) of whole patches."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise UserError(
                f"images are {tuple(images.shape)} of {str(images.dtype).removeprefix('torch.')}: give normalised"
                " floats of shape (B, 3, H, W)"
            )
        self.grid_of(images.shape[-2:])

    def check_pool(self, pool: str) -> None:
        """`UserError` for a pooling that this encoder does not have."""
        if pool not in POOLS:
            raise UserError(f"unknown pool {pool!r}: {nearest(str(pool), POOLS)}")
        if pool == "cls" and not self.has_class_token:
            raise UserError(f"pool=cls: {self.title} has no class token: choose avg or native")
        if pool == "native":
            with torch.no_grad():
                self.width_of(pool)

    def pool(self, tokens: Tensor, pool: str = "cls") -> Tensor:
        """Tokens after the final norm (B, P + L, D) -> one vector per image (B, D), by a name of `POOLS`."""
        if pool == "native":
            return self.native(tokens)
        self.check_pool(pool)
        return tokens[:, 0] if pool == "cls" else tokens[:, self.num_prefix_tokens :].mean(dim=1)

    def features(self, images: Tensor, pool: str = "cls") -> Tensor:
        """Images (B, 3, H, W), normalised -> one vector per image (B, D), by a name of `POOLS`."""
        return self.pool(self(images), pool)

    def width_of(self, pool: str) -> int:
        """The number of channels of `features`."""
        if pool != "native":
            return self.embed_dim
        reference = next(self.parameters())
        length = self.num_prefix_tokens + self.grid_of(self.img_size)[0] * self.grid_of(self.img_size)[1]
        return self.native(reference.new_zeros(1, length, self.embed_dim)).shape[-1]


@contextmanager
def without_memory() -> Iterator[None]:
    """Context that builds encoders on the meta device, where loading only checks."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
        yield


def family_of(arch: str) -> type[Encoder]:
    """The family that an architecture belongs to; `UserError` if there is none."""
    for kind in FAMILIES.module_dict.values():
        if kind.knows(arch):
            return kind
    known = timm.list_models()
    if arch in known:
        raise UserError(f"{arch} is no plain ViT: no family of encoders knows it (see docs/encoders.md)")
    raise UserError(f"timm {timm.__version__} has no architecture {arch!r}: {nearest(arch, known)}")


def build(description: Mapping[str, Any], **changes: Any) -> Encoder:
    """An encoder from its description: `family`, and the arguments of that class.

    Args:
        description: plain values, from a config or a checkpoint. They name a family, never code.
        **changes: arguments that the task sets, such as img_size and drop_path_rate; None leaves the description's.

    Raises:
        UserError: there is no such family, or it refuses the values.
    """
    values = dict(description)
    name = values.pop("family", None)
    known = FAMILIES.module_dict
    if name not in known:
        raise UserError(f"the encoder's family is {name!r}: {nearest(str(name), known)}")
    try:
        return known[name](**values | {key: value for key, value in changes.items() if value is not None})
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"cannot build the encoder {values.get('arch') or name}: {reason}") from None
