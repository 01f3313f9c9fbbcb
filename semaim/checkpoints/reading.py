"""Reading checkpoints of plain ViTs in every dialect, without running code, into a `Checkpoint` with our names."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from semaim.checkpoints import hub_config, same_network
from semaim.checkpoints.dialects import RECOGNISED, find_weights, from_mmpretrain
from semaim.checkpoints.normalisation import Statistics, of_content
from semaim.checkpoints.safe_reading import read_file
from semaim.checkpoints.sanity import check_config, check_state
from semaim.checkpoints.sizes import preset_of, sizes_of
from semaim.errors import UserError


@dataclass
class Checkpoint:
    """A ViT's weights under our names, and what else the file contains."""

    path: Path
    dialect: str
    state: dict[str, Tensor]  #: encoder, and the head or decoder that comes with it
    skipped: list[str]  #: names that were not read: copies, heads of other tasks
    epoch: int | None = None
    config: dict | None = None  #: of the training, in a semaim checkpoint
    classes: list[str] | None = None
    statistics: Statistics | None = None  #: of its training images, from the file or the config next to it
    unsupported: list[str] = field(default_factory=list)  #: those of `skipped` that the encoder computes with
    recorded: dict | None = None  #: timm's network as the file or config.json names it: `architecture`, `model_args`

    @property
    def native(self) -> bool:
        """Whether this suite trained it, so that tensors besides its encoder's belong to its decoder or head."""
        return bool(self.config)

    @cached_property
    def recorded_network(self) -> nn.Module | str | None:
        """timm's network of `recorded`, on the meta device, or why it cannot be built; None if none is recorded."""
        return same_network.timm_model(self.recorded) if self.recorded else None

    @property
    def network(self) -> dict:
        """The network in the config of a semaim checkpoint, or a detector's or segmentor's backbone; else empty."""
        model = (self.config or {}).get("model") or {}
        if backbone := model.get("backbone"):  # its img_size is the crops', not the position table's
            return {**backbone, "img_size": backbone.get("pretrain_img_size")}
        return model.get("network") or {}

    @property
    def sizes(self) -> dict:
        """Sizes of the encoder, as `VisionTransformer` takes them; see `sizes_of`."""
        recorded = self.recorded_network
        heads = same_network.heads_of(recorded) if isinstance(recorded, nn.Module) else None
        return sizes_of(self.state, self.network or ({"size": None, "num_heads": heads} if heads else None))

    @property
    def heads_guessed(self) -> bool:
        """Whether the number of heads is a guess: no config has it, and there is no published model of these sizes."""
        recorded = self.recorded_network
        named = isinstance(recorded, nn.Module) and same_network.heads_of(recorded)
        return not self.network and not named and preset_of(self.sizes) is None


def read(path: str | os.PathLike) -> Checkpoint:
    """Read a checkpoint of any dialect; `UserError` if it holds no plain ViT encoder."""
    path = Path(path)
    return recognise(path, read_file(path), hub_config.find(path))


def recognise(path: Path, content: Any, recorded: dict | None = None) -> Checkpoint:
    """The checkpoint in a file's content.

    Args:
        path: of the file, for messages.
        content: as `read_file` returns it.
        recorded: the config.json next to it, see `hub_config.find`.
    """
    place, weights = find_weights(content)
    names = [name for name in weights if re.search(r"(^|\.)patch_embed\.proj(ection)?\.weight$", name)]
    names = [name for name in names if not re.search(r"(^|\.)ema\.", name)]
    if not names:
        named = weights or (content if isinstance(content, Mapping) else {})
        held = ", ".join(list(dict.fromkeys(str(name).split(".")[0] for name in named))[:6]) or "nothing"
        raise UserError(f"no ViT encoder in {path}: it holds {held}")
    first = min(names, key=len)
    prefix = first[: first.rindex("patch_embed")]
    state = {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}
    skipped = [name for name in weights if not name.startswith(prefix)]
    dialect = next(name for name, is_it in RECOGNISED if is_it(content, place, prefix, state))
    unsupported = []
    if "patch_embed.projection.weight" in state:
        state, skipped = from_mmpretrain(weights, prefix)
        firsts = {name: name[len(prefix) :].partition(".")[0] for name in skipped if name.startswith(prefix)}
        unsupported = [n for n, first in firsts.items() if first != "neck" and not same_network.APART.fullmatch(first)]
    skipped += [name for name in state if name.startswith("ema.")]
    state = {name: tensor for name, tensor in state.items() if not name.startswith("ema.")}
    for name, dimensions in (("patch_embed.proj", 4), ("blocks.0.attn.qkv", 2), ("blocks.0.mlp.fc1", 2)):
        if f"{name}.weight" not in state or state[f"{name}.weight"].ndim != dimensions:
            raise UserError(f"no plain ViT encoder in {path}: it has patches but no {name} of {dimensions} dimensions")
    check_state(path, state)
    native = content if dialect == "semaim" else {}
    check_config(path, native.get("config"))
    holders = [holder for holder in (content, content.get("meta")) if isinstance(holder, Mapping)]
    epoch = next((holder["epoch"] for holder in holders if type(holder.get("epoch")) is int), None)
    statistics = of_content(content, path)
    if recorded is None and isinstance(content.get("arch"), str) and timm.is_model(content["arch"]):
        recorded = {"architecture": content["arch"]}  # of timm's own training
    return Checkpoint(
        path,
        dialect,
        state,
        skipped,
        epoch,
        native.get("config"),
        native["classes"] if isinstance(native.get("classes"), list) else None,
        statistics,
        unsupported,
        recorded,
    )


def classes_of(content: Any) -> list | None:
    """The class names in one of our or of OpenMMLab's files; None if it has none."""
    return _recorded(content, "classes")


def palette_of(content: Any) -> list | None:
    """The colours of the classes, three numbers each, in one of our or of OpenMMLab's files; None if it has none."""
    colours = _recorded(content, "palette") or []
    right = all(isinstance(one, list | tuple) and [type(part) for part in one] == [int] * 3 for one in colours)
    return colours if colours and right else None


def _recorded(content: Any, name: str) -> list | None:
    meta = content.get("meta") if isinstance(content, Mapping) else None
    for holder in (content, meta.get("dataset_meta") if isinstance(meta, Mapping) else None):
        if isinstance(holder, Mapping) and isinstance(holder.get(name), list | tuple):
            return list(holder[name])
    return None
