"""Loading a checkpoint of any dialect into one of our networks, with a report of what was loaded."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semaim.checkpoints import same_network
from semaim.checkpoints.divided import load_whole_state
from semaim.checkpoints.reading import Checkpoint, read
from semaim.checkpoints.same_network import kinds
from semaim.checkpoints.sizes import describe, grid_of, sizes_of
from semaim.errors import UserError
from semaim.models.vit import VisionTransformer

#: The end of a refusal, for commands that have the flag.
PARTIAL_HINT = " (--allow-partial loads what fits, and the results say so)"


@dataclass
class LoadReport:
    """What was loaded from a file into a model, and what was not."""

    path: Path
    dialect: str
    matched: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)  #: "name: from -> to"; they are matched too
    new: list[str] = field(default_factory=list)  #: in the model, and expected to be in no file
    missing: list[str] = field(default_factory=list)  #: in the model, and should have been in the file
    unexpected: list[str] = field(default_factory=list)  #: in the file, and not in the model
    unread: list[str] = field(default_factory=list)  #: those of `unexpected` that the file's encoder computes with
    differs: list[str] = field(default_factory=list)  #: other differences from the file's encoder, in words

    @property
    def lacking(self) -> list[str]:
        """Tensors that the model's encoder computes with and the file lacks."""
        return same_network.lacking(self.missing)

    @property
    def whole(self) -> bool:
        """Whether the model's encoder computes the same as the file's."""
        return not (self.unread or self.lacking or self.differs)

    @property
    def partial_note(self) -> str:
        """How the model's encoder differs from the file's, in words; empty if they are the same."""
        parts = [f"{len(self.unread)} of the file's tensors not read"] if self.unread else []
        parts += [f"{len(self.lacking)} of the encoder's not in the file"] if self.lacking else []
        return ", ".join(parts + self.differs)

    def refuse(self) -> None:
        """`UserError` that names why the model does not compute what the file's encoder does."""
        reasons = [f"it computes with {kinds(self.unread)}, which ours does not read"] if self.unread else []
        reasons += [f"it lacks {kinds(self.lacking)}, which ours computes with"] if self.lacking else []
        if reasons := reasons + self.differs:
            raise UserError(f"{self.path} holds another network's encoder: {'; '.join(reasons)}{PARTIAL_HINT}")

    def summary(self) -> dict:
        """Plain values for results.json: counts and kinds of tensors."""

        def listed(names: list[str]) -> list[str]:
            return kinds(names).split(", ") if names else []

        left = [name for name in self.unexpected if name not in self.unread]
        return {
            "dialect": self.dialect,
            "matched": len(self.matched),
            "resized": list(self.resized),
            "new": listed(self.new),
            "left": grouped(left).split(", ") if left else [],
            "unread": listed(self.unread),
            "missing": listed(self.missing),
            "differs": list(self.differs),
        }

    def __str__(self) -> str:
        lines = [f"loaded {len(self.matched)} tensors from {self.path} ({self.dialect})"]
        if self.resized:
            lines.append(f"resized: {', '.join(self.resized)}")
        if self.new:
            lines.append(f"new, not from the file: {kinds(self.new)}")
        left = [name for name in self.unexpected if name not in self.unread]
        if left:
            lines.append(f"left in the file: {grouped(left)}")
        if self.unread:
            lines.append(f"NOT LOADED, though the encoder of the file computes with them: {kinds(self.unread)}")
        if self.missing:
            lines.append(f"MISSING in the file, left as initialised: {grouped(self.missing)}")
        if self.differs:
            lines.append(f"DIFFERENT in the encoder of the file: {'; '.join(self.differs)}")
        return "\n    ".join(lines)


def grouped(names: Iterable[str]) -> str:
    """Names by their first part, with counts."""
    return kinds(name.split(".")[0] for name in names)


def load(
    model: nn.Module, path: str | os.PathLike | Checkpoint, expected: tuple[str, ...] = (), partial: bool = False
) -> LoadReport:
    """Load a checkpoint of any dialect into a model with our names.

    Position tables are resized to the model's `grid` by its `resample_positions` (timm's if it has none), tables of
    relative positions linearly. If the model sets `resamples_patches`, the patch projection is resized to its patches.
    A head for another number of classes is not loaded.

    Args:
        model: a `VisionTransformer`, or anything with its names and `grid`.
        path: the checkpoint file, or the `Checkpoint` that `read` returned.
        expected: parts of names that are new in this model, such as "head" or "rel_pos_h".
        partial: load what fits of an encoder that differs from the model's.

    Raises:
        UserError: the file holds no ViT, or one of other sizes, or, unless `partial`, a different network.
    """
    report, state = fit(model, path if isinstance(path, Checkpoint) else read(path), expected, partial)
    load_whole_state(model, state, strict=False)
    return report


def fit(
    model: nn.Module, found: Checkpoint, expected: tuple[str, ...] = (), partial: bool = False
) -> tuple[LoadReport, dict[str, Tensor]]:
    """What `load` would load: the report, and the tensors in the model's shapes. The model is not changed."""
    own, state = model.state_dict(), dict(found.state)
    _check_sizes(model, own, found)
    report = LoadReport(found.path, found.dialect)
    pooled, reads_norm = hasattr(model, "pool") or "norm.weight" in own, "norm.weight" in own
    report.unread = same_network.unread(state, own, pooled, found.native) + found.unsupported
    report.missing = [name for name in own if name not in state and not set(expected) & set(name.split("."))]
    report.differs = differences_of(found, getattr(model, "num_heads", None), reads_norm)
    if not partial:
        report.refuse()
    grid = getattr(model, "grid", None)
    for name, tensor in list(state.items()):
        if name not in own:
            continue
        fitted = None
        if (
            name == "pos_embed"
            and grid
            and (tensor.shape != own[name].shape or _recorded_grid(found) not in (None, grid))
        ):
            fitted = _fit_positions(tensor, own[name], model, grid, found, partial)
        elif tensor.shape == own[name].shape:
            continue
        elif name.rpartition(".")[2] in ("rel_pos_h", "rel_pos_w") and tensor.shape[1:] == own[name].shape[1:]:
            fitted = F.interpolate(tensor.T[None].float(), len(own[name]), mode="linear")[0].T.to(tensor.dtype)
        elif name == "patch_embed.proj.weight":
            fitted = resample_patches(tensor, own[name].shape[2:])
        elif name.split(".")[0] == "head":
            report.unexpected.append(name)
            del state[name]
            continue
        if fitted is None:
            shapes = f"{tuple(tensor.shape)} in the file, {tuple(own[name].shape)} in the model"
            raise UserError(f"{found.path} does not fit the model: {name} is {shapes}")
        report.resized.append(f"{name} {tuple(tensor.shape)} -> {tuple(fitted.shape)}")
        state[name] = fitted
    report.matched = [name for name in state if name in own]
    report.unexpected += [name for name in state if name not in own] + found.skipped
    report.missing = []
    for name in own:
        if name not in state:
            (report.new if set(expected) & set(name.split(".")) else report.missing).append(name)
    return report, {name: state[name] for name in report.matched}


def differences_of(found: Checkpoint, heads: int | None, reads_norm: bool) -> list[str]:
    """Differences that no tensor's name shows; see `same_network`."""
    if isinstance(found.recorded_network, str):
        return [found.recorded_network]
    differences = []
    if found.recorded_network is not None:
        differences = same_network.recorded_differences(found.recorded_network, found.sizes, reads_norm)
    elif "cls_token" not in found.state and found.dialect in ("timm", "mae", "semaim", "mmpretrain", "DINO"):
        # A detector's encoder has dropped the class token; any other never had one.
        if not found.native and not any(name.endswith(("rel_pos_h", "rel_pos_w")) for name in found.state):
            differences.append(
                "it does not record its activation, and encoders without a class token have GELU (SigLIP) or its tanh"
                " form (SigLIP 2): put timm's config.json next to a .safetensors"
            )
    if heads and not found.heads_guessed and heads != found.sizes["num_heads"]:
        differences.append(f"it has {found.sizes['num_heads']} heads, ours {heads}")
    return differences


def _check_sizes(model: nn.Module, own: Mapping[str, Tensor], found: Checkpoint) -> None:
    if not {"patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"} <= own.keys():
        raise UserError(f"{type(model).__name__} is no ViT of ours: nothing of {found.path} fits it")
    sizes, own_sizes = found.sizes, {**sizes_of(own), "img_size": None}
    keys = ["embed_dim", "depth", "mlp_ratio"] + ["patch_size"] * (not getattr(model, "resamples_patches", False))
    same = all(sizes[key] == own_sizes[key] for key in keys)
    if not same:
        raise UserError(
            f"{found.path} is a {describe({**sizes, 'img_size': None})}; the model a {describe(own_sizes)}: choose a"
            " config of that encoder, or set model.network's sizes"
        )
    heads = getattr(model, "num_heads", sizes["num_heads"])
    if found.config and heads != sizes["num_heads"]:
        raise UserError(f"{found.path} was trained with {sizes['num_heads']} heads, the model has {heads}")


def resample_patches(weight: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Resize a patch projection (D, C, h, w) to another patch size, bicubic without antialiasing: ViT-H from 14 to 16.

    Source: facebookresearch/long_seq_mae, issue 2, whose authors do this to follow ViTDet.
    """
    return F.interpolate(weight.float(), patch_size, mode="bicubic", align_corners=False).to(weight.dtype)


def _recorded_grid(found: Checkpoint) -> tuple[int, int] | None:
    """The grid of the position table if the file records it: a bare table of 16 rows may be 4 x 4 or 2 x 8."""
    return grid_of(found.sizes) if found.network.get("img_size") else None


def _fit_positions(
    table: Tensor, own: Tensor, model: nn.Module, grid: tuple[int, int], found: Checkpoint, partial: bool = False
) -> Tensor:
    """A position table (1, [1 +] L, D) on the model's grid, with or without the class token's row as `own` has it.

    With `partial`, rows of other tokens between the class token's and the patches' are left out.
    """
    old = grid_of(found.sizes)
    resample = getattr(model, "resample_positions", VisionTransformer.resample_positions)
    length, prefix = old[0] * old[1], own.shape[1] - grid[0] * grid[1]
    if table.ndim != 3 or table.shape[1] not in (length, length + 1) and not (partial and table.shape[1] > length):
        rows = f"{table.shape[1]} rows" if table.ndim == 3 else f"shape {tuple(table.shape)}"
        raise UserError(f"{found.path}: a position table of {rows} is none of {old[0]} x {old[1]} patches")
    patches = resample(table[:, -length:].float(), old, grid).to(table.dtype)
    if not prefix:
        return patches
    # Without a row of its own the class token has no position (timm's no_embed_class).
    first = table[:, :1] if table.shape[1] > length else torch.zeros_like(table[:, :1])
    return torch.cat([first, patches], dim=1)
