"""Tensors of torch's files: their storages are checked before memory is allocated, and against the zip's checksums."""

import io
import math
import mmap
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from semaim.checkpoints.plain_pickle import Broken, Finisher, Interpreter, Limits, Name, key
from semaim.errors import UserError

#: Types of storages in torch's files by name.
STORAGES = {
    **{"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16},
    **{"BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32},
    **{"ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool},
    **{"ComplexDoubleStorage": torch.complex128, "ComplexFloatStorage": torch.complex64},
}
UNTYPED = "torch.storage.UntypedStorage"
#: Types of numbers: neither quantised nor several to a byte.
DTYPES = re.compile(r"(bfloat16|float(8_(?!.*_x\d)\w+|16|32|64)|complex(32|64|128)|u?int(8|16|32|64)|bool)")
MAGIC = 0x1950A86A20F9469CFC6C  #: at the start of torch's files before 1.6, with PROTOCOL
PROTOCOL = 1001
ZIP = b"PK\x03\x04"
CHUNK = 2**24  #: bytes of a storage that are read at a time


class Damaged(UserError):
    """A file's bytes do not match its checksums."""


class Bytes:
    """A storage that is read when a tensor needs it.

    Args:
        size: in bytes.
        item: size of a number in it; 1 if its type is not known.
        name: of its member in a zip.
        read: reads it; None if `held` will be set.

    Attributes:
        tensor: name of the first tensor in it.
        held: what was read.
    """

    def __init__(self, size: int, item: int, name: str, read: "Callable[[Bytes], torch.UntypedStorage] | None" = None):
        self.size, self.item, self.name, self.read = size, item, name, read
        self.tensor = ""
        self.held: torch.UntypedStorage | None = None


class Storage:
    """Bytes, and the type of numbers in them; None in files that give it with each tensor."""

    def __init__(self, held: Bytes, dtype: torch.dtype | None):
        self.held, self.dtype = held, dtype


class View:
    """A tensor: a part of a storage. It is checked here, and made at the end."""

    def __init__(self, limits: Limits, storage: Any, offset: Any, size: Any, stride: Any, dtype: Any = None):
        if not isinstance(storage, Storage) or not all(isinstance(it, tuple) for it in (size, stride)):
            raise Broken("a tensor has no storage or no shape")
        dtype = storage.dtype or dtype
        numbers = (offset, *size, *stride)
        if not isinstance(dtype, torch.dtype) or len(size) != len(stride) or len(size) > 64:
            raise Broken("a tensor has no type or no shape")
        if any(type(number) is not int or not 0 <= number < 2**48 for number in numbers):
            raise Broken("a tensor has a shape of other than whole numbers")
        count = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else offset - 1
        if (last + 1) * dtype.itemsize > storage.held.size:
            raise Broken(f"a tensor of shape {size} is larger than its storage of {storage.held.size:,} bytes")
        limits.take(count * dtype.itemsize)
        self.held, self.dtype, self.place = storage.held, dtype, (offset, size, stride)

    def build(self, state: Any) -> None:
        """Take nothing: a parameter's further attributes are no weights."""

    def finish(self, name: str) -> Tensor:
        """The tensor."""
        self.held.tensor = self.held.tensor or name
        if self.held.held is None:
            if self.held.read is None:
                raise Broken("a tensor's storage is not in the file")
            self.held.held = self.held.read(self.held)
        return torch.empty(0, dtype=self.dtype, device="cpu").set_(self.held.held, *self.place)


def calls_of(limits: Limits) -> dict[str, Callable[..., Any]]:
    """What torch's own pickles call, for `Interpreter`."""

    def view(storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> View:
        return View(limits, storage, offset, size, stride)

    def view_3(storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> View:
        return View(limits, storage, offset, size, stride, dtype_of(more[2]))  # after requires_grad and hooks

    def view_2(storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> View:
        if more[2:] and more[2]:
            raise Broken("a tensor is stored conjugated or negated")
        return view(storage, offset, size, stride)

    def parameter(data: Any, *more: Any) -> View:
        if not isinstance(data, View):
            raise Broken("a parameter is no tensor")
        return data

    def of_type(function: Any, kind: Any, args: Any, state: Any) -> View:
        known = {"torch.Tensor", "torch.nn.parameter.Parameter"}
        if not isinstance(function, Name) or not isinstance(kind, Name) or kind.full not in known:
            raise Broken("a tensor is of another class")
        if function.full not in calls or not function.full.startswith("torch._utils."):
            raise Broken("a tensor is made by no function of torch's")
        return calls[function.full](*args)

    def never(*args: Any) -> Any:
        raise Broken("it makes a tensor that is not stored in it")

    calls: dict[str, Callable[..., Any]] = {
        "torch._utils._rebuild_tensor": view,
        "torch._utils._rebuild_tensor_v2": view_2,
        "torch._utils._rebuild_tensor_v3": view_3,
        "torch._utils._rebuild_parameter": parameter,
        "torch._utils._rebuild_parameter_with_state": parameter,
        "torch.nn.parameter.Parameter": parameter,
        "torch._tensor._rebuild_from_type_v2": of_type,
        "torch.Size": lambda sizes=(): sizes if isinstance(sizes, tuple) else never(),
        "torch.device": lambda *args: args,
        "torch.serialization._get_layout": lambda *args: args,
    }
    names = [f"torch.{name}" for name in (*STORAGES, "Tensor", *filter(DTYPES.fullmatch, dir(torch)))]
    return calls | dict.fromkeys([*names, UNTYPED], never) | plain_calls(limits)


def plain_calls(limits: Limits) -> dict[str, Callable[..., Any]]:
    """Containers that pickles of every kind call, for `Interpreter`."""

    def ordered(pairs: Any = ()) -> OrderedDict:
        limits.take(100 * len(pairs))
        pairs = pairs.items() if isinstance(pairs, dict) else pairs
        return OrderedDict((key(name), value) for name, value in pairs)

    def as_set(items: Any = ()) -> set:
        limits.take(100 * len(items))
        return set(map(key, items))

    def encoded(text: str, coding: str = "latin1") -> bytes:
        if coding != "latin1":  # as Python 3 writes bytes for Python 2
            raise Broken(f"it has bytes coded as {str(coding)[:20]}")
        limits.take(len(text))
        return text.encode("latin1")

    return {
        **{"collections.OrderedDict": ordered, "collections.Counter": ordered, "_codecs.encode": encoded},
        **{"builtins.set": as_set, "builtins.frozenset": as_set, "builtins.bytes": lambda *args: b""},
    }


def dtype_of(name: Any) -> torch.dtype:
    """The type that a name of torch's stands for."""
    module, _, word = name.full.rpartition(".") if isinstance(name, Name) else ("", "", "")
    if module != "torch" or not DTYPES.fullmatch(word):
        raise Broken("a tensor has no type of numbers")
    return getattr(torch, word)


def load_torch(path: Path, unknown: Callable[[str], type], mapped: bool = False) -> Any:
    """The content of a file that `torch.save` wrote, with its tensors on the CPU.

    Args:
        path: of the file.
        unknown: see `Interpreter`.
        mapped: read storages when they are used, without checking their checksums.

    Raises:
        Damaged: a part does not match its checksum, which the zip format has; torch itself does not look at it.
        Exception: of many types, for a file that is broken or no checkpoint.
    """
    with open(path, "rb") as file:
        zipped = file.read(4) == ZIP
    return _load_zip(path, unknown, mapped) if zipped else _load_legacy(path, unknown)


def _storage(pid: Any, find: Callable[[str, int, int], Bytes]) -> Storage:
    """The storage of a persistent id: ("storage", type, key, device, number of elements).

    `find` gives its bytes by key, size of all and size of a number.
    """
    kind, typed, name, _, count, *more = pid if isinstance(pid, tuple) and len(pid) in (5, 6) else [None] * 5
    if not isinstance(typed, Name) or not isinstance(name, str) or not isinstance(count, int):
        raise Broken("a storage is not described as torch does")
    if kind != "storage" or count < 0 or any(view is not None for view in more):
        raise Broken("a storage is not described as torch does")
    if typed.full == UNTYPED:
        return Storage(find(name, count, 1), None)
    dtype = STORAGES.get(typed.full.removeprefix("torch."))
    if dtype is None:
        raise Broken(f"a storage is of type {typed.full}")
    return Storage(find(name, count * dtype.itemsize, dtype.itemsize), dtype)


# Zip files


def _load_zip(path: Path, unknown: Callable[[str], type], mapped: bool) -> Any:
    with zipfile.ZipFile(path) as archive:
        members = _Members(path, archive, mapped)
        if members.text("byteorder") not in (None, b"little"):
            raise Broken("it was written on a big-endian machine")
        limits = Limits(path.stat().st_size)
        pickled = io.BytesIO(members.text("data.pkl") or b"")
        return Finisher().finish(Interpreter(calls_of(limits), unknown, limits, members.stored).load(pickled))


class _Members:
    """The members of torch's zip; see `load_torch` for `mapped`."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, mapped: bool):
        self.path, self.archive, self.infos = path, archive, checked(archive)
        tops = [name for name in self.infos if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(tops) != 1:
            raise Broken("a zip file without torch's data.pkl")
        self.prefix = tops[0].removesuffix("data.pkl")
        self.known: dict[str, Bytes] = {}
        self.whole = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size) if mapped else None

    @contextmanager
    def checking(self, name: str, tensor: str = "") -> Iterator[None]:
        """Context in which a checksum that does not match is `Damaged`, with the member's name and the tensor's."""
        try:
            yield
        except zipfile.BadZipFile as error:
            if "CRC" not in str(error):
                raise
            held = f", which holds {tensor}," if tensor else ""
            reason = f"{name}{held} does not match its checksum; copy or download it again"
            raise Damaged(f"{self.path} is damaged: {reason}") from None

    def text(self, name: str) -> bytes | None:
        """The bytes of a member, without the folder that all have; None if there is none."""
        with self.checking(name):
            return self.archive.read(info) if (info := self.infos.get(self.prefix + name)) else None

    def stored(self, pid: Any) -> Storage:
        """The storage of a persistent id, which is not read yet."""
        return _storage(pid, self.find)

    def find(self, key: str, size: int, item: int) -> Bytes:
        """The bytes of a storage."""
        name = f"{self.prefix}data/{key}"
        if name not in self.infos or size > self.infos[name].file_size:
            raise Broken(f"it lacks {size:,} bytes of the storage {key}")
        return self.known.setdefault(key, Bytes(self.infos[name].file_size, item, name, self.read))

    def read(self, held: Bytes) -> torch.UntypedStorage:
        """A storage, checked against its checksum, or mapped."""
        info = self.infos[held.name]
        if self.whole is not None and (start := self.start(info)) % 64 == 0:
            return self.whole[start : start + held.size]
        buffer = torch.empty(held.size, dtype=torch.uint8, device="cpu")
        view, place = buffer.numpy().data, 0
        with self.checking(held.name, held.tensor), self.archive.open(info) as file:
            while count := file.readinto(view[place : place + CHUNK]):  # type: ignore[attr-defined]
                place += count
        if place < held.size:
            raise Broken(f"{held.name} is cut off")
        return buffer.untyped_storage()

    def start(self, info: zipfile.ZipInfo) -> int:
        """Where a member's bytes begin."""
        with open(self.path, "rb") as file:
            file.seek(info.header_offset)
            name, extra = struct.unpack("<26xHH", file.read(30))
        start = info.header_offset + 30 + name + extra
        if start + info.file_size > self.archive.start_dir:
            raise Broken(f"{info.filename[:60]} is larger than its place in the file")
        return start


def checked(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The members of a zip by name; none is compressed, and none shares its bytes with another."""
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    if len({info.filename for info in infos}) < len(infos):
        raise Broken("a zip file with two members of one name")
    for info, after in zip(infos, [*infos[1:], None], strict=True):
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise Broken(f"{info.filename[:60]} is compressed or encrypted, as torch writes none")
        end = info.header_offset + 30 + len(info.orig_filename) + info.file_size
        if info.file_size != info.compress_size or end > (after.header_offset if after else archive.start_dir):
            raise Broken(f"{info.filename[:60]} is larger than its place in the file")
    if not any(info.CRC for info in infos if info.file_size):  # torch.serialization.set_crc32_options(False)
        for info in infos:
            info.CRC = None  # type: ignore[assignment]  # as zipfile has it for a member without one
    return {info.filename: info for info in infos}


# Files before torch 1.6


def _load_legacy(path: Path, unknown: Callable[[str], type]) -> Any:
    """Of torch's format before 1.6, which mm's publishing tools still write: five pickles, then the storages."""
    known: dict[str, Bytes] = {}

    def find(key: str, size: int, item: int) -> Bytes:
        held = known.setdefault(key, Bytes(size, item, key))
        if (held.size, held.item) != (size, item):
            raise Broken(f"the storage {key} has two sizes")
        return held

    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        limits = Limits(len(view))
        stored = partial(_storage, find=find)
        parts = (Interpreter(calls_of(limits), unknown, limits, stored).load(view) for _ in range(5))
        if next(parts) != MAGIC or next(parts) != PROTOCOL:
            raise Broken("no file of torch's")
        system, content, keys = parts
        if isinstance(system, dict) and system.get("little_endian") is False:
            raise Broken("it was written on a big-endian machine")
        file.seek(view.tell())
        for key in keys if isinstance(keys, list) else ():
            held = known[key]
            (count,) = struct.unpack("<q", file.read(8))
            if count * held.item != held.size or held.size > len(view) - file.tell():
                raise Broken(f"it lacks {held.size:,} bytes of the storage {key}")
            buffer = torch.empty(held.size, dtype=torch.uint8, device="cpu")
            file.readinto(buffer.numpy().data)
            held.held = buffer.untyped_storage()
        return Finisher().finish(content)
