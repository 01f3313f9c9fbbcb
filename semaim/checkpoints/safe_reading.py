"""Reading checkpoint files of any origin without running code from them."""

import os
import pickle
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file

from semaim.errors import UserError
from semaim.reading import once

#: Objects that common tools store with their weights. They are read as inert stand-ins, never imported.
HARMLESS = re.compile(
    r"(argparse\.Namespace|_codecs\.encode|copyreg\._reconstructor"
    r"|builtins\.(getattr|set|frozenset|slice|complex|bytearray|object|list|dict|tuple|int|float|str|bytes|bool)"
    r"|(mmengine|mmcv|mmdet|mmseg|mmpretrain|mmselfsup|mmcls|detectron2|fvcore|timm|omegaconf|yacs|addict|easydict"
    r"|ml_collections|lightning|pytorch_lightning|numpy|pathlib|collections|typing|datetime|enum)\..+)"
)
#: Those of `HARMLESS` that a pickle fills like a dict.
DICTIONARIES = re.compile(r".+(\.Dict|ConfigDict|defaultdict|CfgNode|EasyDict|AttributeDict)")
#: Functions that a pickle of numpy arrays calls, for numpy 1 (core) and 2 (_core), and their replacements. numpy's own
#: constructors would trust any flags in the file.
ARRAYS: dict[str, Callable] = {}


def read_file(path: str | os.PathLike) -> Any:
    """The content of .safetensors, .pth or detectron2's .pkl, on the CPU; a file that would run code is refused."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is a folder: name a file" if path.is_dir() else f"no such checkpoint: {path}")
    try:
        return once(path, _read)
    except UserError:
        raise
    except Exception as error:  # zip, pickle, header and memory errors are of many types
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in reason:
            reason = "it holds more than tensors and plain containers"
        raise UserError(f"cannot read {path}: broken or no checkpoint ({reason})") from None


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".pkl":
        with open(path, "rb") as file:
            return _ArrayUnpickler(file, path).load()
    return _load_inert(path)


def _load_inert(path: Path) -> Any:
    """`torch.load` with stand-ins for harmless objects; `UserError` names the first that is not harmless."""
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
    """Context without globals allowed elsewhere: after `add_safe_globals([getattr])`, a file could call getattr."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)


def _globals_in(path: Path) -> list[str]:
    """Full names of what a file's pickle imports, except from torch."""
    if zipfile.is_zipfile(path):
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    names = []  # torch's format before 1.6, which mm's publishing tools still write: five pickles, then the storages
    with open(path, "rb") as file:
        for _ in range(5):
            for code, arg, _ in pickletools.genops(file):
                if code.name == "GLOBAL":
                    module, name = str(arg).split(" ")[:2]
                    # Protocol 2 writes the modules' names of Python 2.
                    names.append(NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name)))
    # torch's unpickler itself allows or refuses names from torch.
    return sorted({f"{module}.{name}" for module, name in names if module.partition(".")[0] != "torch"})


def _refusal(path: Path | str, name: str) -> UserError:
    return UserError(f"{path} is refused: reading it would call {name}, which no checkpoint needs")


class _Inert(list):
    """Stands in for an unwanted object: accepts any arguments, items and state, and does nothing."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # it may be a key; a list's is None

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        """Take nothing of what is given."""

    def __setstate__(self, state):
        """Take nothing of what is given."""


class _InertDict:
    """Stands in for a subclass of dict: torch fills no other object by key."""

    def __new__(cls, *args, **kwargs):
        return OrderedDict()


class _DType:
    """Stands in for numpy's dtype of numbers or strings, whose values are in the bytes themselves."""

    def __init__(self, code: str, align: object = False, copy: object = True):
        if not isinstance(code, str) or not re.fullmatch(r"[biufc]\d{1,2}|[US]\d{1,4}", code):
            raise pickle.UnpicklingError(f"an array of {code!r} is none of numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        """State: version, byte order, and fields that only structured dtypes have."""
        if state[1] not in ("<", ">", "=", "|") or any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("an array of several fields is none of numbers")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands in for numpy's array while its pickle is read; `array` is the finished one."""

    def __init__(self, *ignored: object):
        self.array = np.empty(0)

    def __setstate__(self, state: tuple) -> None:
        """State: version, shape, dtype, whether in Fortran order, bytes."""
        _, shape, dtype, by_column, data = state
        self.array = _from_buffer(data, dtype, shape, "F" if by_column else "C").array


def _from_buffer(data: bytes | bytearray | str, dtype: _DType, shape: tuple, order: Literal["C", "F"] = "C") -> _Array:
    found = _Array()
    data = data.encode("latin1") if isinstance(data, str) else data  # of Python 2
    # A copy is writable and aligned.
    found.array = np.frombuffer(bytes(data), dtype.dtype).reshape(shape, order=order).copy()
    return found


def _scalar(dtype: _DType, data: bytes | str) -> _Array:
    return _from_buffer(data, dtype, ())


def _to_bytes(text: str, coding: str = "latin1") -> bytes:
    if coding != "latin1":  # as Python 3 writes bytes for Python 2
        raise pickle.UnpicklingError(f"bytes coded as {coding}")
    return text.encode("latin1")


ARRAYS |= {"numpy.ndarray": _Array, "numpy.dtype": _DType, "_codecs.encode": _to_bytes}
ARRAYS |= {"collections.OrderedDict": OrderedDict}
ARRAYS |= {f"{builtins}.bytes": lambda: b"" for builtins in ("builtins", "__builtin__")}  # an empty array's
for _core in ("numpy.core", "numpy._core"):
    ARRAYS |= {f"{_core}.multiarray._reconstruct": _Array, f"{_core}.multiarray.scalar": _scalar}
    ARRAYS |= {f"{_core}.numeric._frombuffer": _from_buffer}


class _ArrayUnpickler(pickle.Unpickler):
    """Plain containers and numpy arrays of numbers or strings."""

    def __init__(self, file, path: Path):
        super().__init__(file, encoding="latin1")  # Python 2 wrote many of them
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in ARRAYS:
            raise _refusal(self.path, f"{module}.{name}")
        return ARRAYS[f"{module}.{name}"]

    def load(self) -> Any:
        """The content, with arrays in place of their stand-ins."""
        return _arrays_in(super().load())


def _arrays_in(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.array
    if isinstance(value, dict):
        return type(value)((key, _arrays_in(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value)(_arrays_in(item) for item in value)
    return value
