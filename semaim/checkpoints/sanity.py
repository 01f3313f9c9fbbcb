"""What a forged checkpoint may hold in place of an encoder's tensors and settings; one line says which."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from semaim.errors import UserError

#: Most of each size of a network; the published ones have a tenth. More would take hours to build.
MOST = {"depth": 1000, "decoder_depth": 1000}
LARGEST = 100_000  #: of every other size
COUNTS = ("embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_depth", "decoder_num_heads")
SHAPES = ("img_size", "patch_size", "pretrain_img_size")  #: one number or two


def check_state(path: Path, state: Mapping[str, Tensor]) -> None:
    """`UserError` for tensors of an encoder whose shapes give no sizes."""
    for name, tensor in state.items():
        least = 2 if name == "pos_embed" else 1 if name.endswith(("weight", "bias", "token")) else 0
        if tensor.ndim < least or least and 0 in tensor.shape:
            raise UserError(f"no plain ViT encoder in {path}: {name} has the shape {tuple(tensor.shape)}")
        number = re.match(r"\w*blocks\.(\d+)\.", name)
        if number and (len(number[1]) > 4 or int(number[1]) >= len(state)):
            raise UserError(f"no plain ViT encoder in {path}: it names block {number[1][:20]} of {len(state)} tensors")


def check_config(path: Path, config: Any) -> None:
    """`UserError` for a run's config in a checkpoint that is none, as far as reading the checkpoint uses it."""
    config = mapping_in(path, config, "config")
    model = mapping_in(path, config.get("model"), "config.model")
    for part in ("network", "backbone"):
        network = mapping_in(path, model.get(part), f"config.model.{part}")
        check_sizes(f"{path}: config.model.{part}", network)
    mapping_in(path, config.get("dataset"), "config.dataset")


def mapping_in(path: Path, value: Any, name: str) -> Mapping:
    """A mapping, or an empty one for None; `UserError` for anything else."""
    if value is not None and not isinstance(value, Mapping):
        raise UserError(f"{path} is broken: {name} is no mapping but {str(value)[:60]!a}")
    return value or {}


def check_sizes(where: str, network: Mapping) -> None:
    """`UserError` for sizes that no network has."""
    for name in (*COUNTS, *SHAPES):
        value = network.get(name)
        numbers = list(value) if name in SHAPES and isinstance(value, list | tuple) and len(value) == 2 else [value]
        most = MOST.get(name, LARGEST)
        if value is not None and any(type(number) is not int or not 0 < number <= most for number in numbers):
            raise UserError(f"{where}.{name} is {str(value)[:60]!a}: give whole numbers from 1 to {most:,}")
    if not isinstance(network.get("size"), str | None):
        raise UserError(f"{where}.size is no name")
