"""Reading checkpoint files of any origin without running code from them."""

import os
import pickle
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from semaim.errors import UserError

#: Records that files of the field's tools hold beside their weights. They are read as inert stand-ins, never imported.
HARMLESS = re.compile(
    r"(argparse\.Namespace|_codecs\.encode|copyreg\._reconstructor"
    r"|builtins\.(getattr|set|frozenset|slice|complex|bytearray|object|list|dict|tuple|int|float|str|bytes|bool)"
    r"|(mmengine|mmcv|mmdet|mmseg|mmpretrain|mmselfsup|mmcls|detectron2|fvcore|timm|omegaconf|yacs|addict|easydict"
    r"|ml_collections|lightning|pytorch_lightning|numpy|pathlib|collections|typing|datetime|enum)\..+)"
)
#: Of these, the ones that a pickle fills as it fills a dict.
DICTIONARIES = re.compile(r".+(\.Dict|ConfigDict|defaultdict|CfgNode|EasyDict|AttributeDict)")
#: All that a pickle of numpy arrays needs (detectron2's .pkl).
ARRAYS = {"numpy.ndarray", "numpy.dtype", "_codecs.encode", "collections.OrderedDict"} | {
    f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")
}


def read_file(path: str | os.PathLike) -> Any:
    """The content of .safetensors, .pth or detectron2's .pkl, on the CPU; a file that would run code is refused."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is a folder: name a file" if path.is_dir() else f"no such checkpoint: {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".pkl":
            with open(path, "rb") as file:
                return _ArrayUnpickler(file, path).load()
        return _load_inert(path)
    except UserError:
        raise
    except Exception as error:  # zip, pickle, header and memory errors are of many types
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in reason:
            reason = "it holds more than tensors and plain containers"
        raise UserError(f"cannot read {path}: broken or no checkpoint ({reason})") from None


def _load_inert(path: Path) -> Any:
    """`torch.load` with stand-ins for harmless records; `UserError` names the first that is none."""
    with _no_allowed_globals():
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            names = _globals_in(path)
        for name in names:
            if not HARMLESS.fullmatch(name):
                raise _refusal(path, name)
        kinds = [(_InertDict if DICTIONARIES.fullmatch(name) else _Inert, name) for name in names]
        with torch.serialization.safe_globals([(type("StandIn", (kind,), {}), name) for kind, name in kinds]):
            return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def _no_allowed_globals() -> Iterator[None]:
    """Without what the program allowed elsewhere: after an `add_safe_globals([getattr])`, files would call it."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)


def _globals_in(path: Path) -> list[str]:
    """Full names of what a file's pickle imports, beyond what torch takes by itself."""
    if zipfile.is_zipfile(path):
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    names = []  # torch's format before 1.6, which mm's publishing tools still write: five pickles, then the storages
    with open(path, "rb") as file:
        for _ in range(5):
            found = [tuple(arg.split(" ")) for code, arg, _ in pickletools.genops(file) if code.name == "GLOBAL"]
            # Protocol 2 writes the modules' names of Python 2.
            names += [NAME_MAPPING.get(pair, (IMPORT_MAPPING.get(pair[0], pair[0]), pair[1])) for pair in found]
    # The unpickler itself allows or refuses what is torch's own.
    return sorted({f"{module}.{name}" for module, name in names if module.partition(".")[0] != "torch"})


def _refusal(path: Path | str, name: str) -> UserError:
    return UserError(f"{path} is refused: reading it would call {name}, which no checkpoint needs")


class _Inert(list):
    """Stands for an object that is not wanted: takes any arguments, items and state, and does nothing."""

    __hash__ = object.__hash__  # it may be a key

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        """Take nothing of what is given."""

    def __setstate__(self, state):
        """Take nothing of what is given."""


class _InertDict:
    """Stands for a subclass of dict: torch fills no other object by key."""

    def __new__(cls, *args, **kwargs):
        return OrderedDict()


class _ArrayUnpickler(pickle.Unpickler):
    """Plain containers and numpy arrays."""

    def __init__(self, file, path: Path):
        super().__init__(file, encoding="latin1")  # Python 2 wrote many of them
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in ARRAYS:
            raise _refusal(self.path, f"{module}.{name}")
        return super().find_class(module, name)
