"""Reading checkpoint files of any origin without running code from them."""

import mmap
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.torch import load_file

from semaim.checkpoints.plain_pickle import Broken, Finisher, Interpreter, Limits, StandIn, key
from semaim.checkpoints.storages import load_torch, plain_calls
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
        reason = "".join(sign if sign.isprintable() else "?" for sign in reason)  # it may quote a name in the file
        raise UserError(f"cannot read {path}: broken or no checkpoint ({reason})") from None


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return {key(name): tensor for name, tensor in load_file(path).items()}
    if path.suffix == ".pkl":
        return _load_arrays(path)
    return load_torch(path, lambda name: _stand_in(path, name))


def _stand_in(path: Path, name: str) -> type:
    """The type that stands in for a harmless object; `UserError` for any other."""
    if re.fullmatch(r"torch\._utils\._rebuild_\w+", name):
        raise UserError(
            f"{path} is refused: it holds a sparse, quantised, nested or other tensor that is none of weights"
        )
    if not HARMLESS.fullmatch(name):
        raise _refusal(path, name)
    return dict if DICTIONARIES.fullmatch(name) else StandIn


def _load_arrays(path: Path) -> Any:
    """Plain containers and numpy arrays of numbers or strings."""

    def unknown(name: str) -> type:
        raise _refusal(path, name)

    with open(path, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as file:
        limits = Limits(len(file))
        calls = {**plain_calls(limits), **array_calls(limits)}
        return Finisher().finish(Interpreter(calls, unknown, limits).load(file))


def _refusal(path: Path | str, name: str) -> UserError:
    return UserError(f"{path} is refused: reading it would call {name}, which no checkpoint needs")


class _DType:
    """Stands in for numpy's dtype of numbers or strings, whose values are in the bytes themselves."""

    def __init__(self, code: str, align: object = False, copy: object = True):
        if not isinstance(code, str) or not re.fullmatch(r"[biufc]\d{1,2}|[US]\d{1,4}", code):
            raise Broken(
                f"an array of {code!r:.40} is none of numbers: it holds more than tensors and plain containers"
            )
        self.dtype = np.dtype(code)

    def build(self, state: Any) -> None:
        """State: version, byte order, and fields that only structured dtypes have."""
        if state[1] not in ("<", ">", "=", "|") or any(part is not None for part in state[2:5]):
            raise Broken("an array of several fields is none of numbers")
        self.dtype = self.dtype.newbyteorder(state[1])

    def finish(self, name: str) -> np.dtype:
        """The type."""
        return self.dtype


class _Array:
    """Stands in for numpy's array while its pickle is read; `array` is the finished one."""

    def __init__(self, limits: Limits):
        self.limits, self.array = limits, np.empty(0)

    def build(self, state: Any) -> None:
        """State: version, shape, dtype, whether in Fortran order, bytes."""
        _, shape, dtype, by_column, data = state
        self.fill(data, dtype, shape, "F" if by_column else "C")

    def fill(self, data: Any, dtype: Any, shape: Any, order: Literal["C", "F"] = "C") -> "_Array":
        """Take its values."""
        # of Python 2 if it is text
        data = data.encode("latin1") if isinstance(data, str) else data
        if not isinstance(data, bytes | bytearray) or not isinstance(dtype, _DType) or order not in ("C", "F"):
            raise Broken("an array without its bytes")
        self.limits.take(len(data))
        # A copy is writable and aligned.
        self.array = np.frombuffer(bytes(data), dtype.dtype).reshape(shape, order=order).copy()
        return self

    def finish(self, name: str) -> np.ndarray:
        """The array."""
        return self.array


def array_calls(limits: Limits) -> dict[str, Callable[..., Any]]:
    """What a pickle of numpy arrays calls, of numpy 1 (core) and 2 (_core). numpy's own would trust any flags in it."""
    calls: dict[str, Callable[..., Any]] = {
        "numpy.ndarray": lambda *args: _Array(limits),
        "numpy.dtype": _DType,
    }
    for core in ("numpy.core", "numpy._core"):
        calls |= {
            f"{core}.multiarray._reconstruct": lambda *args: _Array(limits),
            f"{core}.multiarray.scalar": lambda dtype, data: _Array(limits).fill(data, dtype, ()),
            f"{core}.numeric._frombuffer": lambda *args: _Array(limits).fill(*args),
        }
    return calls
