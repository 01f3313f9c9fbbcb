"""The config.json next to a weights file, of timm and of the Hugging Face hub."""

import os
from pathlib import Path

from semaim.checkpoints.sanity import check_sizes
from semaim.errors import UserError
from semaim.reading import read_json

#: Names without extension of the files that a folder's config.json belongs to, as in timm.
WEIGHTS = ("model", "pytorch_model", "open_clip_model", "open_clip_pytorch_model")
ENDINGS = (".safetensors", ".bin", ".pth", ".pt")  #: of files of weights


def find(path: str | os.PathLike) -> dict | None:
    """The config that belongs to a weights file, or None.

    It is NAME.json if that exists; else the folder's config.json, if the file has a name of `WEIGHTS` or is the only
    weights file in its folder. A JSON file without an `architecture` is not a timm config.

    Returns:
        dict with `architecture` (str), `model_args` (dict, may be empty), `pretrained_cfg` (dict: `mean`, `std` and
        more) and everything else in it. timm's older configs, a pretrained_cfg alone, are converted to this form.

    Raises:
        UserError: it is not JSON.
    """
    path = Path(path)
    file = path.with_suffix(".json")
    if not file.is_file() or file.name == "config.json":
        file = path.with_name("config.json")
        if not file.is_file() or (path.stem not in WEIGHTS and _others(path)):
            return None
    try:
        config = read_json(file)
    except UserError as error:
        raise UserError(f"cannot read {file}, next to {path.name}: {error}") from None
    if not isinstance(config.get("architecture"), str):
        return None
    if "pretrained_cfg" not in config:
        kept = ("architecture", "num_features", "num_classes", "model_args")
        rest = {name: value for name, value in config.items() if name not in ("architecture", "model_args")}
        config = {name: config[name] for name in kept if name in config} | {"pretrained_cfg": rest}
    for name in ("model_args", "pretrained_cfg"):
        if config.get(name) is None:
            config[name] = {}
        if not isinstance(config[name], dict):
            raise UserError(f"{file}: {name} is no mapping but {config[name]!r:.60}")
    check_sizes(f"{file}: model_args", config["model_args"])
    return config


def _others(path: Path) -> bool:
    """Whether there are other weights files in the folder."""
    return any(other != path and other.suffix in ENDINGS for other in path.parent.iterdir())
