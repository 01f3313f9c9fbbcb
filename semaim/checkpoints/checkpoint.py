"""Checkpoints of plain ViTs in every dialect: read without running code, load with a report, convert, export.

Inside, a checkpoint's weights have our names, which are timm's: `cls_token`, `pos_embed`, `patch_embed.proj`,
`blocks.N.{norm1,attn.qkv,attn.proj,norm2,mlp.fc1,mlp.fc2}`, `norm`, `fc_norm`, `head`.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import to_2tuple
from torch import Tensor, nn

from semaim import __version__
from semaim.checkpoints import hub_config, same_network
from semaim.checkpoints.divided import load_whole_state
from semaim.checkpoints.files import FORMAT, CannotSave, write_checkpoint
from semaim.checkpoints.normalisation import Statistics, of_content
from semaim.checkpoints.safe_reading import read_file
from semaim.checkpoints.same_network import ENCODER, kinds
from semaim.errors import UserError, nearest
from semaim.models.vit import SIZES, VisionTransformer

#: Parts of a block in mmpretrain (left) and ours.
MMPRETRAIN_BLOCK = (
    ("ln1", "norm1"),
    ("attn.qkv", "attn.qkv"),
    ("attn.proj", "attn.proj"),
    ("ln2", "norm2"),
    ("ffn.layers.0.0", "mlp.fc1"),
    ("ffn.layers.1", "mlp.fc2"),
)
#: What mmseg's segmentation backbones, MAE and BEiT, have in a block besides.
MMSEG_BLOCK = (
    ("attn.relative_position_bias_table", "attn.rel_bias"),
    ("gamma_1", "gamma_1"),
    ("gamma_2", "gamma_2"),
)
#: A buffer of theirs that is no weight: it is made of the grid.
INERT = "attn.relative_position_index"
#: mmpretrain's names (left) and ours; {n} is a block. Where two of theirs stand for one of ours, the first is written.
MMPRETRAIN = (
    ("backbone.cls_token", "cls_token"),
    ("backbone.pos_embed", "pos_embed"),
    ("backbone.patch_embed.projection", "patch_embed.proj"),
    *((f"backbone.layers.{{n}}.{theirs}", f"blocks.{{n}}.{ours}") for theirs, ours in MMPRETRAIN_BLOCK),
    ("backbone.ln1", "norm"),
    ("backbone.norm1", "norm"),  # before 1.0
    ("backbone.ln2", "fc_norm"),
    *((f"backbone.layers.{{n}}.{theirs}", f"blocks.{{n}}.{ours}") for theirs, ours in MMSEG_BLOCK),
    ("neck.bn", "head.0"),  # the batch normalisation of a linear probe
    ("neck.mask_token", "mask_token"),  # from here on MAE's decoder
    ("neck.decoder_embed", "decoder_embed"),
    ("neck.decoder_pos_embed", "decoder_pos_embed"),
    *((f"neck.decoder_blocks.{{n}}.{theirs}", f"decoder_blocks.{{n}}.{ours}") for theirs, ours in MMPRETRAIN_BLOCK),
    ("neck.ln1", "decoder_norm"),
    ("neck.decoder_pred", "decoder_pred"),
)
#: Their head has a name of its own in each classifier: of the class token, of the mean of the patches, of a probe.
MMPRETRAIN_HEADS = (("head.layers.head", "head"), ("head.fc", "head"), ("head.layers.head", "head.1"))

#: What a classifier and MAE's decoder consist of besides the encoder; all else is a neck or a head of another task.
CLASSIFIER = ("fc_norm", "head")
MAE_DECODER = ("mask_token", "decoder_embed", "decoder_pos_embed", "decoder_blocks", "decoder_norm", "decoder_pred")

#: The dialects, first match first, by (content, place of the weights in it, prefix of the encoder's names, its names).
RECOGNISED = (
    ("semaim", lambda content, place, prefix, names: content.get("format") == FORMAT),
    ("official SemAIM", lambda content, place, prefix, names: isinstance(content.get("model"), str)),
    (
        "mmseg segmentor",
        lambda content, place, prefix, names: (
            "patch_embed.projection.weight" in names
            and any(str(name).startswith("decode_head.") for name in (content[place] if place else content))
        ),
    ),
    ("mmpretrain", lambda content, place, prefix, names: "patch_embed.projection.weight" in names),
    ("detectron2", lambda content, place, prefix, names: prefix.endswith("backbone.net.")),
    ("DINO", lambda content, place, prefix, names: place == "teacher"),
    ("detector or segmentor", lambda content, place, prefix, names: prefix.endswith("backbone.")),
    ("mae", lambda content, place, prefix, names: place == "model"),
    ("timm", lambda content, place, prefix, names: True),
)
#: What `convert` writes: the parts that each holds besides the encoder and the classifier ("*": all).
WRITTEN = {"semaim": "*", "timm": (), "mae": MAE_DECODER, "mmpretrain": MAE_DECODER}
DIALECTS = tuple(WRITTEN)


# Reading


@dataclass
class Checkpoint:
    """A ViT's weights under our names, and what else the file tells."""

    path: Path
    dialect: str
    state: dict[str, Tensor]  #: encoder, and the head or decoder that stands beside it
    other: list[str]  #: names that were not taken: copies, heads of other tasks
    epoch: int | None = None
    config: dict | None = None  #: of a run of ours
    classes: list[str] | None = None
    statistics: Statistics | None = None  #: of the images it was trained on, where the file or one beside it tells
    beyond: list[str] = field(default_factory=list)  #: of `other`, what the encoder computes with and we have not
    told: dict | None = None  #: by whom timm's network is named: `architecture`, `model_args`

    @property
    def ours(self) -> bool:
        """Whether a run of this suite wrote the file: what stands beside its encoder is its decoder or head."""
        return bool(self.config)

    @cached_property
    def theirs(self) -> nn.Module | str | None:
        """timm's network that the file, or the config.json beside it, names, or why there is none; None if none is."""
        return self.told and same_network.timm_model(self.told)

    @property
    def network(self) -> dict:
        """What the config of a run of ours tells of the network, or of a detector's or segmentor's backbone."""
        model = (self.config or {}).get("model") or {}
        if backbone := model.get("backbone"):  # its img_size is that of the crops, not of the position table
            return {**backbone, "img_size": backbone.get("pretrain_img_size")}
        return model.get("network") or {}

    @property
    def sizes(self) -> dict:
        """Sizes of the encoder, as `VisionTransformer` takes them; see `sizes_of`."""
        heads = same_network.heads_of(self.theirs) if isinstance(self.theirs, nn.Module) else None
        return sizes_of(self.state, self.network or (heads and {"size": None, "num_heads": heads}))

    @property
    def heads_guessed(self) -> bool:
        """Whether neither a config nor a published model of these sizes tells the number of heads."""
        named = isinstance(self.theirs, nn.Module) and same_network.heads_of(self.theirs)
        return not self.network and not named and _preset(self.sizes) is None


def sizes_of(state: Mapping[str, Tensor], network: Mapping | None = None) -> dict:
    """embed_dim, depth, num_heads, patch_size, img_size (height, width) and mlp_ratio of an encoder's weights.

    Heads leave no trace in the weights: `network`, the config of a run of ours, tells them, or the published model of
    that width and depth; else they are 64 channels wide.
    """
    width, _, *patch = state["patch_embed.proj.weight"].shape
    depth = 1 + max(int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name)))
    preset = (network and network.get("size", "base")) or _preset({"embed_dim": width, "depth": depth})
    heads = (network or {}).get("num_heads") or (SIZES[preset]["num_heads"] if preset in SIZES else max(1, width // 64))
    img_size = None
    if network and network.get("img_size"):
        img_size = to_2tuple(network["img_size"])
    elif "pos_embed" in state:
        side = math.isqrt(state["pos_embed"].shape[1])  # with or without the class token's row
        img_size = (side * patch[0], side * patch[1])
    return {
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "patch_size": tuple(patch),
        "img_size": img_size,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
    }


def _preset(sizes: Mapping) -> str | None:
    """The published model of these sizes."""
    wanted = sizes["embed_dim"], sizes["depth"]
    return next((name for name, size in SIZES.items() if (size["embed_dim"], size["depth"]) == wanted), None)


def describe(sizes: Mapping) -> str:
    """Sizes in words."""
    name = _preset(sizes)
    patch = "x".join(map(str, dict.fromkeys(sizes["patch_size"])))
    text = f"ViT{'-' + name if name else ''} of width {sizes['embed_dim']}, depth {sizes['depth']}, patch {patch}"
    text += f", MLP ratio {sizes['mlp_ratio']:g}" if sizes["mlp_ratio"] != 4 else ""
    return text + (f", {'x'.join(map(str, dict.fromkeys(sizes['img_size'])))} px" if sizes["img_size"] else "")


def read(path: str | os.PathLike) -> Checkpoint:
    """Read a checkpoint of any dialect; `UserError` if it holds no plain ViT encoder."""
    path = Path(path)
    return recognise(path, read_file(path), hub_config.beside(path))


def recognise(path: Path, content: Any, told: dict | None = None) -> Checkpoint:
    """The checkpoint that a file's content is; `told` is the config.json beside it, see `hub_config.beside`."""
    place, weights = _find_weights(content)
    names = [name for name in weights if re.search(r"(^|\.)patch_embed\.proj(ection)?\.weight$", name)]
    names = [name for name in names if not re.search(r"(^|\.)ema\.", name)]
    if not names:
        named = weights or (content if isinstance(content, Mapping) else {})
        held = ", ".join(list(dict.fromkeys(str(name).split(".")[0] for name in named))[:6]) or "nothing"
        raise UserError(f"no ViT encoder in {path}: it holds {held}")
    first = min(names, key=len)
    prefix = first[: first.rindex("patch_embed")]
    state = {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}
    other = [name for name in weights if not name.startswith(prefix)]
    dialect = next(name for name, is_it in RECOGNISED if is_it(content, place, prefix, state))
    beyond = []
    if "patch_embed.projection.weight" in state:
        state, other = _from_mmpretrain(weights, prefix)
        named = [(name, name[len(prefix) :].partition(".")[0]) for name in other if name.startswith(prefix)]
        beyond = [name for name, first in named if first != "neck" and not same_network.APART.fullmatch(first)]
    other += [name for name in state if name.startswith("ema.")]
    state = {name: tensor for name, tensor in state.items() if not name.startswith("ema.")}
    for name, dimensions in (("patch_embed.proj", 4), ("blocks.0.attn.qkv", 2), ("blocks.0.mlp.fc1", 2)):
        if f"{name}.weight" not in state or state[f"{name}.weight"].ndim != dimensions:
            raise UserError(f"no plain ViT encoder in {path}: it has patches but no {name} of {dimensions} dimensions")
    ours = content if dialect == "semaim" else {}
    tellers = [told for told in (content, content.get("meta")) if isinstance(told, Mapping)]
    epoch = next((told["epoch"] for told in tellers if isinstance(told.get("epoch"), int)), None)
    statistics = of_content(content, path)
    if told is None and isinstance(content.get("arch"), str) and timm.is_model(content["arch"]):
        told = {"architecture": content["arch"]}  # of timm's own training
    return Checkpoint(
        path, dialect, state, other, epoch, ours.get("config"), ours.get("classes"), statistics, beyond, told
    )


def classes_of(content: Any) -> list | None:
    """The names of the classes that a file of ours or of mm says it was trained on; None where it says none."""
    meta = content.get("meta") if isinstance(content, Mapping) else None
    for holder in (content, meta.get("dataset_meta") if isinstance(meta, Mapping) else None):
        if isinstance(holder, Mapping) and isinstance(holder.get("classes"), list | tuple):
            return list(holder["classes"])
    return None


def _find_weights(content: Any) -> tuple[str, dict[str, Tensor]]:
    """Where in a file the weights are ("" for the top), and they."""
    if not isinstance(content, Mapping):
        return "", {}
    place = next((key for key in ("model", "state_dict", "teacher") if isinstance(content.get(key), Mapping)), "")
    weights = {}
    for name, value in (content[place] if place else content).items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.dtype.isnative:
            value = torch.as_tensor(value)
        if isinstance(name, str) and isinstance(value, Tensor):
            weights[name] = value
    return place, weights


def rename(name: str, pairs: Iterable[tuple[str, str]]) -> str | None:
    """A name by the first pair whose left side it is or begins with; None by none."""
    for left, right in pairs:
        pattern = re.escape(left).replace(r"\{n\}", r"(?P<n>\d+)") + r"(?P<rest>\..+)?"
        if match := re.fullmatch(pattern, name):
            return right.replace("{n}", match.groupdict().get("n") or "") + (match["rest"] or "")
    return None


def _from_mmpretrain(weights: dict[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], list[str]]:
    """Weights under our names, and the names that have none."""
    root = prefix.removesuffix("backbone.")  # of a file of the encoder alone, both are empty
    theirs = {name: name[len(root) :] for name in weights if name.startswith((f"{root}head.", f"{root}neck."))}
    theirs |= {n: f"backbone.{n[len(prefix) :]}" for n in weights if n.startswith(prefix) and n not in theirs}
    probe = "neck.bn.running_mean" in theirs.values()
    heads = [pair for pair in MMPRETRAIN_HEADS if (pair[1] == "head.1") == probe]
    ours = {name: rename(short, (*MMPRETRAIN, *heads)) for name, short in theirs.items()}
    state = {ours[name]: tensor for name, tensor in weights.items() if ours.get(name)}
    return state, [name for name in weights if not ours.get(name) and not name.endswith(INERT)]


def _to_mmpretrain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under mmpretrain's names, those that it has."""
    if "head.1.weight" in state:
        heads = MMPRETRAIN_HEADS[2:]
    else:
        heads = MMPRETRAIN_HEADS[1:2] if "fc_norm.weight" in state else MMPRETRAIN_HEADS[:1]
    pairs = [(ours, theirs) for theirs, ours in (*MMPRETRAIN, *heads)]
    return {theirs: tensor for name, tensor in state.items() if (theirs := rename(name, pairs))}


# Loading


@dataclass
class LoadReport:
    """What went from a file into a model, and what did not."""

    path: Path
    dialect: str
    matched: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)  #: "name: from -> to"; they are matched too
    new: list[str] = field(default_factory=list)  #: of the model, expected to be in no file
    missing: list[str] = field(default_factory=list)  #: of the model, and should have been there
    unexpected: list[str] = field(default_factory=list)  #: of the file, and not of the model
    unread: list[str] = field(default_factory=list)  #: of these, what the file's encoder computes with
    differs: list[str] = field(default_factory=list)  #: what the file's encoder computes otherwise, in words

    @property
    def lacking(self) -> list[str]:
        """What the model's encoder computes with and the file lacks."""
        return same_network.lacking(self.missing)

    @property
    def whole(self) -> bool:
        """Whether the model's encoder computes what that of the file does."""
        return not (self.unread or self.lacking or self.differs)

    @property
    def partly(self) -> str:
        """How the model's encoder is another than that of the file, in words; nothing where it is the same."""
        told = [f"{len(self.unread)} of the file's tensors not read"] if self.unread else []
        told += [f"{len(self.lacking)} of the encoder's not in the file"] if self.lacking else []
        return ", ".join(told + self.differs)

    def refuse(self) -> None:
        """`UserError` that names what keeps the model from computing what the file's encoder does."""
        told = [f"it computes with {kinds(self.unread)}, which ours does not read"] if self.unread else []
        told += [f"it lacks {kinds(self.lacking)}, which ours computes with"] if self.lacking else []
        if told := told + self.differs:
            raise UserError(
                f"{self.path} holds another network's encoder: {'; '.join(told)} (--allow-partial loads what fits, and"
                " the results say so)"
            )

    def summary(self) -> dict:
        """Plain values for results.json: numbers of tensors, and their kinds."""

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
            lines.append(f"NOT TAKEN, though the encoder of the file computes with them: {kinds(self.unread)}")
        if self.missing:
            lines.append(f"MISSING in the file, left as initialised: {grouped(self.missing)}")
        if self.differs:
            lines.append(f"OTHERWISE in the encoder of the file: {'; '.join(self.differs)}")
        return "\n    ".join(lines)


def grouped(names: Iterable[str]) -> str:
    """Names by their first part, with counts."""
    return kinds(name.split(".")[0] for name in names)


def load(
    model: nn.Module, path: str | os.PathLike | Checkpoint, expected: tuple[str, ...] = (), partial: bool = False
) -> LoadReport:
    """Load a checkpoint of any dialect into a model with our names.

    Position tables are resized to the model's `grid` by its `resample_positions` (timm's if it has none), tables of
    relative positions linearly, and, where the model has `resamples_patches`, the patch projection to its patches; a
    head for another number of classes stays in the file.

    Args:
        model: a `VisionTransformer`, or anything with its names and `grid`.
        path: the checkpoint, or what `read` found in it.
        expected: parts of names that are new in this model, such as "head" or "rel_pos_h".
        partial: load what fits of an encoder that computes with more, less or otherwise than the model's.

    Raises:
        UserError: the file holds no ViT, or one of other sizes, or, unless `partial`, one that is another network.
    """
    report, state = fit(model, path if isinstance(path, Checkpoint) else read(path), expected, partial)
    load_whole_state(model, state, strict=False)
    return report


def fit(
    model: nn.Module, found: Checkpoint, expected: tuple[str, ...] = (), partial: bool = False
) -> tuple[LoadReport, dict[str, Tensor]]:
    """What `load` would load: its report, and the tensors as the model takes them. The model is looked at alone."""
    own, state = model.state_dict(), dict(found.state)
    _check_sizes(model, own, found)
    report = LoadReport(found.path, found.dialect)
    pooled, reads_norm = hasattr(model, "pool") or "norm.weight" in own, "norm.weight" in own
    report.unread = same_network.unread(state, own, pooled, found.ours) + found.beyond
    report.missing = [name for name in own if name not in state and not set(expected) & set(name.split("."))]
    report.differs = _differences(found, getattr(model, "num_heads", None), reads_norm)
    if not partial:
        report.refuse()
    grid = getattr(model, "grid", None)
    for name, tensor in list(state.items()):
        if name not in own:
            continue
        fitted = None
        if name == "pos_embed" and grid and (tensor.shape != own[name].shape or _told_grid(found) not in (None, grid)):
            fitted = _fit_positions(tensor, own[name], model, found, partial)
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
    report.unexpected += [name for name in state if name not in own] + found.other
    report.missing = []
    for name in own:
        if name not in state:
            (report.new if set(expected) & set(name.split(".")) else report.missing).append(name)
    return report, {name: state[name] for name in report.matched}


def _differences(found: Checkpoint, heads: int | None, reads_norm: bool) -> list[str]:
    """What no tensor's name tells; see `same_network`."""
    if isinstance(found.theirs, str):
        return [found.theirs]
    told = []
    if found.theirs is not None:
        told = same_network.told_differences(found.theirs, found.sizes, reads_norm)
    elif "cls_token" not in found.state and found.dialect in ("timm", "mae", "semaim", "mmpretrain", "DINO"):
        # A detector's encoder has dropped it; else it never had one.
        if not found.ours and not any(name.endswith(("rel_pos_h", "rel_pos_w")) for name in found.state):
            told = ["it does not tell its activation, and encoders without a class token have GELU (SigLIP) or its tanh"
                    " form (SigLIP 2): put timm's config.json beside a .safetensors"]  # fmt: skip
    if heads and not found.heads_guessed and heads != found.sizes["num_heads"]:
        told.append(f"it has {found.sizes['num_heads']} heads, ours {heads}")
    return told


def _check_sizes(model: nn.Module, own: Mapping[str, Tensor], found: Checkpoint) -> None:
    if not {"patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"} <= own.keys():
        raise UserError(f"{type(model).__name__} is no ViT of ours: nothing of {found.path} fits it")
    theirs, ours = found.sizes, {**sizes_of(own), "img_size": None}
    keys = ["embed_dim", "depth", "mlp_ratio"] + ["patch_size"] * (not getattr(model, "resamples_patches", False))
    same = all(theirs[key] == ours[key] for key in keys)
    if not same:
        raise UserError(
            f"{found.path} is a {describe({**theirs, 'img_size': None})}; the model a {describe(ours)}: choose a config"
            " of that encoder, or set model.network's sizes"
        )
    heads = getattr(model, "num_heads", theirs["num_heads"])
    if found.config and heads != theirs["num_heads"]:
        raise UserError(f"{found.path} was trained with {theirs['num_heads']} heads, the model has {heads}")


def resample_patches(weight: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """A patch projection (D, C, h, w) for patches of another size, bicubic without antialiasing: ViT-H from 14 to 16.

    Source: facebookresearch/long_seq_mae, issue 2, whose authors follow ViTDet so.
    """
    return F.interpolate(weight.float(), patch_size, mode="bicubic", align_corners=False).to(weight.dtype)


def _grid(sizes: Mapping) -> tuple[int, int]:
    return tuple(size // patch for size, patch in zip(sizes["img_size"], sizes["patch_size"], strict=True))


def _told_grid(found: Checkpoint) -> tuple[int, int] | None:
    """The grid of the position table where the file tells it: a bare table of 16 rows may be 4 x 4 or 2 x 8."""
    return _grid(found.sizes) if found.network.get("img_size") else None


def _fit_positions(table: Tensor, own: Tensor, model: nn.Module, found: Checkpoint, partial: bool = False) -> Tensor:
    """A position table (1, [1 +] L, D) on the model's grid, with or without the class token's row as `own` has it.

    With `partial`, rows of other tokens between the class token's and the patches' are left out.
    """
    old, grid = _grid(found.sizes), model.grid
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


# Writing


def convert(path: str | os.PathLike, out: str | os.PathLike, to: str, partial: bool = False) -> list[str]:
    """Write a checkpoint in another dialect; returns the names that it leaves out.

    Args:
        path: a checkpoint of any dialect.
        out: .pth, or for timm also .safetensors.
        to: one of `DIALECTS`. Weights are the same to the last bit.
        partial: write what is a plain ViT's of an encoder that computes with more, less or otherwise.
    """
    if to not in DIALECTS:
        raise UserError(f"unknown dialect {to!r}: {nearest(to, DIALECTS)}")
    out = Path(out)
    found = read(path)
    if out.exists() and out.samefile(path):
        raise UserError(f"{out} is the checkpoint itself: name another file")
    if out.suffix == ".safetensors" and to != "timm":
        raise UserError(f"{out}: .safetensors holds tensors only, {to} more: name a .pth")
    report = plain_report(found, keeps_all=to == "semaim")
    if not partial:
        report.refuse()
    parts = (*ENCODER, *CLASSIFIER, *WRITTEN[to])
    state = {name: t.contiguous() for name, t in found.state.items() if "*" in parts or name.split(".")[0] in parts}
    if to == "semaim":
        content = {"format": FORMAT, "version": __version__, "epoch": found.epoch, "classes": found.classes}
        content |= {"config": found.config, "model": state}
    elif to == "mae":
        content = {"model": state}
    elif to == "mmpretrain":
        content = {"meta": {"epoch": found.epoch}, "state_dict": _to_mmpretrain(state)}
        state = _from_mmpretrain(content["state_dict"], "backbone.")[0]
    else:
        content = state
    if to != "timm" and found.statistics:  # a bare dict of weights has no place for them
        content["pretrained_cfg"] = {"mean": found.statistics.mean, "std": found.statistics.std}
    if out.suffix == ".safetensors":
        _save_tensors(state, out)
    else:
        try:
            write_checkpoint(content, out)
        except CannotSave as error:
            raise UserError(str(error).partition(";")[0]) from None  # there is no run to go on with
    return [name for name in found.state if name not in state] + found.other


def plain_report(found: Checkpoint, keeps_all: bool = False) -> LoadReport:
    """What keeps a file's encoder from being a plain ViT as `VisionTransformer` is; see `LoadReport.refuse`.

    Args:
        found: the file.
        keeps_all: its further tensors are kept too: those of our dense backbones, which read them, are no loss.
    """
    blocks = (f"blocks.{n}.{part}" for n in range(found.sizes["depth"]) for _, part in MMPRETRAIN_BLOCK)
    own = ["cls_token", "pos_embed"]
    own += [f"{part}.{kind}" for part in ("patch_embed.proj", *blocks) for kind in ("weight", "bias")]
    dense = {"rel_pos_h", "rel_pos_w", *(same_network.DENSE if found.ours else ())} if keeps_all else set()
    kept = {name for name in found.state if name.rpartition(".")[2] in dense}
    report = LoadReport(found.path, found.dialect)
    known = {*own, "norm.weight", "norm.bias"} | kept
    report.unread = same_network.unread(found.state, known, True, found.ours) + found.beyond
    detector = any(name.endswith("rel_pos_h") for name in kept)  # has dropped the class token
    report.missing = [name for name in own if name not in found.state and not (detector and name == "cls_token")]
    report.differs = _differences(found, None, "norm.weight" in found.state)
    return report


def _save_tensors(state: dict[str, Tensor], out: Path) -> None:
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Copies: safetensors refuses tensors that share memory.
        save_file({name: tensor.clone() for name, tensor in state.items()}, partial, metadata={"format": "pt"})
        os.replace(partial, out)
    except Exception as error:  # safetensors raises an error of its own for a full disk
        raise UserError(f"cannot write {out}: {error}") from None
    finally:
        if partial.exists():
            partial.unlink()


#: timm's plain ViTs.
TIMM = {(size, (16, 16)): f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")} | {
    ("huge", (14, 14)): "vit_huge_patch14_224"
}


def export(path: str | os.PathLike, folder: str | os.PathLike, partial: bool = False) -> str:
    """Write model.safetensors and config.json, which `timm.create_model("local-dir:FOLDER", pretrained=True)` opens.

    A linear probe's batch normalisation goes into its head: W / sqrt(var + eps), and b less that times the mean.

    Args:
        path: a checkpoint of any dialect.
        folder: made where it is not there.
        partial: leave out what the encoder computes with beyond a plain ViT.

    Returns:
        The architecture in timm.
    """
    found = read(path)
    sizes, folder = found.sizes, Path(folder)
    weights = folder / "model.safetensors"
    if weights.exists() and weights.samefile(path):
        raise UserError(f"{weights} is the checkpoint itself: name another folder")
    report = plain_report(found)
    if not partial:
        report.refuse()
    parts = (*ENCODER, *CLASSIFIER)
    kept = [name for name in found.state if name.split(".")[0] in parts and name not in report.unread]
    state = {name: found.state[name].contiguous() for name in kept}
    if "head.1.weight" in state:
        state = _fold_probe(state)
    if "fc_norm.weight" in state:  # then nothing reads the other
        state = {name: tensor for name, tensor in state.items() if not name.startswith("norm.")}
    average = "norm.weight" not in state
    classes = len(state["head.weight"]) if "head.weight" in state else 0
    preset = _preset(sizes)
    architecture = TIMM.get((preset, sizes["patch_size"]))
    model_args = {"img_size": sizes["img_size"], "global_pool": "avg" if average else "token"}
    if not architecture or sizes["mlp_ratio"] != 4 or sizes["num_heads"] != SIZES[preset]["num_heads"]:
        architecture = "vit_base_patch16_224"
        model_args |= {key: sizes[key] for key in ("embed_dim", "depth", "num_heads", "patch_size", "mlp_ratio")}
    if state.get("pos_embed") is not None and state["pos_embed"].shape[1] == math.prod(_grid(sizes)):
        model_args["no_embed_class"] = True
    if average:
        model_args["fc_norm"] = model_args["final_norm"] = "fc_norm.weight" in state
    _check_timm(found.path, state, architecture, classes, model_args)
    statistics = found.statistics or Statistics()
    config = {
        "architecture": architecture,
        "num_classes": classes,
        "num_features": sizes["embed_dim"],
        "global_pool": model_args["global_pool"],
        "model_args": model_args,
        "pretrained_cfg": {
            "input_size": [3, *sizes["img_size"]],
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "mean": list(statistics.mean),
            "std": list(statistics.std),
            "num_classes": classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    if found.classes:
        config["label_names"] = found.classes
    _save_tensors(state, weights)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return architecture


def _check_timm(path: Path, state: dict[str, Tensor], architecture: str, classes: int, model_args: dict) -> None:
    """`UserError` if timm's model has other weights than these."""
    if not model_args["img_size"]:
        raise UserError(f"{path} has no position table: timm's ViT needs one")
    with torch.device("meta"):  # names and shapes take no memory
        theirs = timm.create_model(architecture, num_classes=classes, **model_args).state_dict()
    wrong = {
        "lacks": [name for name in theirs if name not in state],
        "has besides": [name for name in state if name not in theirs],
        "has in other shapes": [name for name in state if name in theirs and state[name].shape != theirs[name].shape],
    }
    told = "; ".join(f"{what} {', '.join(names[:3])}" for what, names in wrong.items() if names)
    if told:
        raise UserError(f"{path} is no plain ViT of timm's: it {told}")


def _fold_probe(state: dict[str, Tensor]) -> dict[str, Tensor]:
    scale = (state["head.0.running_var"].double() + 1e-6).rsqrt()
    weight = state["head.1.weight"].double() * scale
    bias = state["head.1.bias"].double() - weight @ state["head.0.running_mean"].double()
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    return {**kept, "head.weight": weight.float(), "head.bias": bias.float()}


def inspect(path: str | os.PathLike) -> str:
    """What a checkpoint is, and what our consumers take from it, or why they refuse it."""
    from semaim.checkpoints.consumers import verdicts  # which imports this module

    found = read(path)
    state, sizes = found.state, found.sizes
    encoder = [name for name in state if name.split(".")[0] in ENCODER]
    parts = [name for name in state if name not in encoder]
    rows = [
        ("file", f"{found.path}, {found.path.stat().st_size / 2**20:.1f} MiB"),
        ("dialect", found.dialect),
        ("encoder", describe(sizes)),
        ("heads", f"{sizes['num_heads']}" + (" (a guess: 64 channels each)" if found.heads_guessed else "")),
        ("weights", f"{sum(state[name].numel() for name in encoder):,} in {len(encoder)} tensors"),
        ("epochs", "not told" if found.epoch is None else str(found.epoch)),
        ("beside it", grouped(parts) or "nothing"),
        ("images", str(found.statistics or Statistics(origin="ImageNet's, as the file holds none"))),
    ]
    if found.other:
        rows.append(("not read", grouped(found.other)))
    if head := next((name for name in ("head.weight", "head.1.weight") if name in state), None):
        named = ", ".join(map(str, (found.classes or [])[:3])) + (", ..." if len(found.classes or []) > 3 else "")
        rows.append(("classes", f"{len(state[head])}" + (f": {named}" if named else "")))
    rows += verdicts(found)
    try:
        plain_report(found).refuse()
        rows.append(("convert, export", "as a plain ViT"))
    except UserError as error:
        rows.append(("convert, export", f"refused: {error}"))
    return "\n".join(f"{name:15} {value}" for name, value in rows)
