"""Paths of the suite's own files, in a checkout or installed from a wheel, which contains the configs too."""

from __future__ import annotations  # `semaim env` has to start on a Python that is too old, to report it

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent  #: the checkout, or the folder of installed packages
IN_CHECKOUT = (ROOT / "tools" / "train.py").is_file()
CONFIG_FOLDERS = ("semaim/configs", "mmdet_configs", "mmseg_configs")


def config_folder(name: str) -> Path:
    """A folder of `CONFIG_FOLDERS`: in a checkout at its own path; a wheel has all of them inside the package."""
    return (ROOT if IN_CHECKOUT else PACKAGE / "installed") / name


def own_configs() -> dict[str, Path]:
    """All configs of the suite, including _base_: name, such as mmdet_configs/semaim_mask_rcnn.py -> file."""
    folders = {name: config_folder(name) for name in CONFIG_FOLDERS}
    return {
        f"{name}/{file.relative_to(folder).as_posix()}": file
        for name, folder in folders.items()
        for file in sorted(folder.rglob("*.py"))
    }


def own_config(name: str) -> Path:
    """The file of one of the suite's configs, by name; any other name is taken as a path."""
    folder = next((folder for folder in CONFIG_FOLDERS if name.startswith(f"{folder}/")), None)
    return config_folder(folder) / name.removeprefix(f"{folder}/") if folder else Path(name)


def here(path: Path) -> str:
    """A path as it would be typed in the current folder."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def typed_config(name: str) -> str:
    """A config of the suite as it would be typed in the current folder: its name, if that finds it."""
    return name if not (IN_CHECKOUT or os.path.exists(name)) else here(own_config(name))


def to_install(extra: str) -> str:
    """The command that adds an extra: det, seg, corruptions, all or scenes."""
    return f"tools/setup.sh --extras {extra}" if IN_CHECKOUT else f"pip install 'semaim[{extra}]'"


#: Beginnings of the names of encoders that are no files: timm's weights, a repository of the hub, a folder.
NAMED = ("timm:", "hf-hub:", "hf_hub:", "local-dir:")


def is_name(source: object) -> bool:
    """Whether the source of an encoder is a name with one of these beginnings, not a file."""
    return str(source).startswith(NAMED)
