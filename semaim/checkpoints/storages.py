"""Tensors of torch's files: their storages are checked before memory is allocated, and against the zip's checksums."""

import io
import math
import mmap
import pickle
import re
import struct
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
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


class Damaged(UserError):
    """A file's bytes do not match its checksums."""


class Bytes:
    """A storage that is not read yet; `tensor` is the name of the first tensor in it."""

    def __init__(self, size: int, read: "Callable[[Bytes], torch.UntypedStorage] | None" = None):
        self.size, self.read, self.tensor = size, read, ""
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


def _typed(pid: Any, unfinished: Callable[[str, int], Bytes]) -> Storage:
    """The storage of a persistent id: ("storage", type, key, device, number of elements)."""
    kind, typed, name, _, count, *more = pid if isinstance(pid, tuple) and len(pid) in (5, 6) else [None] * 5
    if not isinstance(typed, Name) or not isinstance(name, str) or not isinstance(count, int):
        raise Broken("a storage is not described as torch does")
    if kind != "storage" or count < 0 or any(view is not None for view in more):
        raise Broken("a storage is not described as torch does")
    if typed.full == UNTYPED:
        return Storage(unfinished(name, count), None)
    dtype = STORAGES.get(typed.full.removeprefix("torch."))
    if dtype is None:
        raise Broken(f"a storage is of type {typed.full}")
    return Storage(unfinished(name, count * dtype.itemsize), dtype)


def _load_zip(path: Path, unknown: Callable[[str], type], mapped: bool) -> Any:
    limits = Limits(path.stat().st_size)
    with zipfile.ZipFile(path) as archive:
        members = checked(archive)
        tops = [name for name in members if name.endswith("data.pkl") and name.count("/") == 1]
        if len(tops) != 1:
            raise Broken("a zip file without torch's data.pkl")
        prefix = tops[0].removesuffix("data.pkl")
        whole = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size) if mapped else None

        def content(name: str, tensor: str = "") -> torch.UntypedStorage:
            info = members[name]
            if whole is not None and (start := _start(archive, info)) % 64 == 0:
                return whole[start : start + info.file_size]
            buffer = torch.empty(info.file_size, dtype=torch.uint8, device="cpu")
            view, place = buffer.numpy().data, 0
            try:
                with archive.open(info) as file:
                    while count := file.readinto(view[place : place + 2**24]):  # type: ignore[attr-defined]
                        place += count
                    file.read(1)  # the checksum is checked at the end
            except zipfile.BadZipFile as error:
                raise damage(path, name, tensor, error) from None
            if place < info.file_size:
                raise Broken(f"{name} is cut off")
            return buffer.untyped_storage()

        def text(name: str) -> bytes:
            try:
                return archive.read(members[name])
            except zipfile.BadZipFile as error:
                raise damage(path, name, "", error) from None

        known: dict[str, Bytes] = {}

        def stored(pid: Any) -> Storage:
            def unfinished(name: str, size: int) -> Bytes:
                member = f"{prefix}data/{name}"
                if member not in members or size > members[member].file_size:
                    raise Broken(f"it lacks {size:,} bytes of the storage {name}")
                read = lambda held: content(member, held.tensor)  # noqa: E731
                return known.setdefault(name, Bytes(members[member].file_size, read))

            return _typed(pid, unfinished)

        if f"{prefix}byteorder" in members and text(f"{prefix}byteorder") != b"little":
            raise Broken("it was written on a big-endian machine")
        calls = calls_of(limits)
        return Finisher().finish(Interpreter(calls, unknown, limits, stored).load(io.BytesIO(text(tops[0]))))


def damage(path: Path, member: str, tensor: str, error: Exception) -> Exception:
    """The error for a member that cannot be read: its checksum, or its header."""
    if "CRC" not in str(error):
        return error
    held = f", which holds {tensor}," if tensor else ""
    return Damaged(f"{path} is damaged: {member}{held} does not match its checksum; copy or download it again")


def checked(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The members of a zip by name; none is compressed, and none shares its bytes with another."""
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    if max(Counter(info.filename for info in infos).values(), default=0) > 1:
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


def _start(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin."""
    file = archive.fp
    if file is None:
        raise Broken("a closed file")
    file.seek(info.header_offset)
    name, extra = struct.unpack("<26xHH", file.read(30))
    start = info.header_offset + 30 + name + extra
    if start + info.file_size > archive.start_dir:
        raise Broken(f"{info.filename[:60]} is larger than its place in the file")
    return start


def _load_legacy(path: Path, unknown: Callable[[str], type]) -> Any:
    """Of torch's format before 1.6, which mm's publishing tools still write: five pickles, then the storages."""
    with open(path, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as file:
        limits, known = Limits(len(file)), dict[str, tuple[Bytes, int]]()

        def stored(pid: Any) -> Storage:
            found: list[Bytes] = []

            def unfinished(name: str, size: int) -> Bytes:
                found.append(known.setdefault(name, (Bytes(size), 1))[0])
                if found[0].size != size:
                    raise Broken(f"the storage {name} has two sizes")
                return found[0]

            storage = _typed(pid, unfinished)
            known[pid[2]] = (storage.held, storage.dtype.itemsize if storage.dtype else 1)
            return storage

        def load() -> Any:
            return Interpreter(calls_of(limits), unknown, limits, stored).load(file)

        if load() != MAGIC or load() != PROTOCOL:
            raise pickle.UnpicklingError("no file of torch's")
        system, content, names = load(), load(), load()
        if isinstance(system, dict) and system.get("little_endian") is False:
            raise Broken("it was written on a big-endian machine")
        for name in names if isinstance(names, list) else ():
            if name not in known:
                raise Broken(f"it holds a storage {str(name)[:40]} that nothing uses")
            held, item = known[name]
            (count,) = struct.unpack("<q", file.read(8))
            if count * item != held.size or held.size > len(file) - file.tell():
                raise Broken(f"it lacks {held.size:,} bytes of the storage {name}")
            buffer = torch.empty(held.size, dtype=torch.uint8, device="cpu")
            opened.seek(file.tell())
            opened.readinto(buffer.numpy().data)
            file.seek(held.size, 1)
            held.held = buffer.untyped_storage()
        return Finisher().finish(content)
