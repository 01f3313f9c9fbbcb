"""Features of a frozen encoder, extracted once by all processes and stored in files.

Shapes: N images, D channels, T tokens. Stored features are fp16.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from semaim.engine.watching import progress
from semaim.errors import UserError
from semaim.reading import write_json

Arrays = dict[str, np.ndarray]  #: by name, one row per image; `LABELS` among them
Shapes = Mapping[str, tuple[int, ...]]  #: name -> shape of an image's row
LABELS = "labels"


def processes() -> tuple[int, int]:
    """Rank of this process and number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def reduce_sum(values: Tensor) -> Tensor:
    """Sum over the processes, the same on each; with one process `values` itself. Waits for all processes."""
    if processes()[1] == 1:
        return values
    total = values.cuda() if dist.get_backend() == "nccl" else values
    total = total.clone()
    dist.all_reduce(total)
    return total.to(values.device)


def gather_rows(own: Tensor, length: int) -> Tensor:
    """Rows [rank::world] of every process -> all rows (length, ...) in order, the same on each. Waits for all."""
    rank, world = processes()
    if world == 1:
        return own
    rows = own.new_zeros(length, *own.shape[1:])
    rows[rank::world] = own
    return reduce_sum(rows)


def extract_features(
    encode: Callable[[Tensor], Mapping[str, Tensor]],
    loader: Iterable[dict[str, Tensor]],
    length: int,
    shapes: Shapes,
    device: torch.device | str,
    cache: str | os.PathLike | None = None,
    key: Mapping[str, str] | None = None,
    log: Callable[[str], None] | None = None,
) -> Arrays:
    """Features and labels of a whole data set, on every process.

    Args:
        encode: images (B, 3, H, W) -> name -> features (B, ...), of a network in eval mode; called without gradient.
        loader: yields this process's share of the images, each once: dicts of `image`, float (B, 3, H, W), and `label`
            and `index`, int64 (B,).
        length: N.
        shapes: which of the features are wanted, and their shapes without N: (D,) for a vector, (T, D) for tokens.
        device: of the images given to `encode`.
        cache: folder of `NAME.npy`, `labels.npy` and `done.json`, on a file system that all processes share; None
            keeps the features in memory, for one process only.
        key: what the features depend on, such as weights, files and transform, in words or hashes; read on the main
            process. Complete files with the same key and whole contents are reused; what is missing is added to them.
        log: called with lines of progress.

    Returns:
        For each name of `shapes` (N, ...) fp16, with a cache a read-only memory map; and `labels` (N,) int64.
    """
    rank, world = processes()
    if cache is None:
        if world > 1:
            raise UserError(f"{world} processes hand each other features in files: name a folder for them (cache)")
        made, kept = dict(shapes), {}
        arrays = {name: np.zeros((length, *shape), np.float16) for name, shape in shapes.items()}
        arrays[LABELS] = np.zeros(length, np.int64)
    else:
        if rank == 0 and not key:
            raise ValueError("a cache needs a key that names what is in it")
        cache = Path(cache)
        stored = _stored(cache, dict(key or {}), length, shapes, log) if rank == 0 else {}
        # Rank 0 decides for all; and no other process opens the files before they are there.
        found = reduce_sum(torch.tensor([int(stored.get(name) == shape) for name, shape in shapes.items()])).tolist()
        made = {name: shape for (name, shape), there in zip(shapes.items(), found, strict=True) if not there}
        if not made:
            if log:
                log(f"{length} features read from {cache}")
            opened = _open(cache, shapes, "r")
            reduce_sum(torch.tensor(0))  # a fast process must not rewrite what another has yet to open
            return opened
        kept = {name: shape for name, shape in stored.items() if name not in made}
        if rank == 0:
            _allocate(cache, length, made, kept)
        reduce_sum(torch.tensor(0))
        arrays = _open(cache, made, "r+")

    count, broken, written, done = torch.zeros(length, dtype=torch.int32), 0, 0, 0
    for step, batch in enumerate(loader):
        progress(f"features of batch {step + 1}")
        with torch.no_grad():
            encoded = encode(batch["image"].to(device, non_blocking=True))
        index = batch["index"].cpu()
        if len(outside := index[(index < 0) | (index >= length)]):
            raise UserError(f"the loader's image {int(outside[0])} is none of 0 to {length - 1}")
        finite = torch.ones(len(index), dtype=torch.bool)
        for name, shape in made.items():
            if encoded[name].shape != (len(index), *shape):
                raise ValueError(f"encode gave {tuple(encoded[name].shape)} in place of {(len(index), *shape)}")
            half = encoded[name].half().cpu()
            finite &= half.isfinite().flatten(1).all(dim=1)
            arrays[name][index.numpy()] = half.numpy()
            written += _checksum(half.numpy())
        broken += int((~finite).sum())
        arrays[LABELS][index.numpy()] = batch["label"].cpu().numpy()
        count.index_add_(0, index, torch.ones(len(index), dtype=torch.int32))
        done += len(index)
        if log and step % 100 == 99:
            log(f"features of {min(done * world, length)} of {length} images")

    for rows in arrays.values():
        if isinstance(rows, np.memmap):
            rows.flush()
    # From here on all processes have the same numbers, so either all raise or none.
    count, (broken, written) = reduce_sum(count), reduce_sum(torch.tensor([broken, written])).tolist()
    if missing := int((count == 0).sum()):
        raise UserError(f"{missing} of {length} images were not loaded: the first is image {int(count.argmin())}")
    if int(count.max()) > 1:
        again, first = int((count > 1).sum()), int((count > 1).int().argmax())
        raise UserError(f"{again} of {length} images were loaded more than once: the first is image {first}")
    if broken:
        raise UserError(f"the features of {broken} of {length} images are not finite, or beyond fp16's 65504")
    if cache is None:
        return arrays

    # Nodes that do not share files, or write back whole pages of them (NFS), lose each other's rows.
    arrays = _open(cache, shapes, "r")
    if reduce_sum(torch.tensor(int(sum(_checksum(arrays[name]) for name in made) != written))):
        raise UserError(f"{cache} does not hold what the processes wrote: name a folder that all nodes share")
    if rank == 0:
        sums = {path.name: _crc(path) for name in (*kept, *made, LABELS) for path in [cache / f"{name}.npy"]}
        complete = {"key": dict(key or {}), "length": length, "shapes": kept | made, "crc32": sums}
        write_json(cache / "done.json", complete)
    if log:
        log(f"{length} features written to {cache}")
    return arrays


def _stored(
    cache: Path, key: dict[str, str], length: int, wanted: Iterable[str], log: Callable[[str], None] | None
) -> dict[str, tuple]:
    """Shapes of the complete features in a folder, by name; none if their key is another or those wanted are damaged.

    The log then says so.
    """
    if not (cache / "done.json").exists():
        return {}
    try:
        done = json.loads((cache / "done.json").read_text())
        before, shapes = dict(done["key"]), {name: tuple(shape) for name, shape in done["shapes"].items()}
        changed = [f"{name} changed" for name in key | before if before.get(name) != key.get(name)]
        if not changed:
            arrays, sums = _open(cache, shapes, "r"), done["crc32"]
            right = [arrays[name].shape == (length, *shape) for name, shape in shapes.items()]
            if done["length"] != length or not all(right) or len(arrays[LABELS]) != length:
                changed = ["their number changed"]
            files = [f"{name}.npy" for name in (*(name for name in wanted if name in shapes), LABELS)]
            changed = changed or [f"{name} is damaged" for name in files if _crc(cache / name) != sums[name]]
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RecursionError, UserError):
        changed = ["done.json or an array is damaged, or of an older version"]
    if changed and log:
        log(f"features in {cache} are extracted anew: {', '.join(changed)}")
    return {} if changed else shapes


def _crc(path: Path) -> int:
    """CRC-32 of a file: zlib's, about 1 s for a GB that is in memory."""
    value = 0
    with open(path, "rb") as file:
        while part := file.read(1 << 24):
            value = zlib.crc32(part, value)
    return value


def _allocate(cache: Path, length: int, shapes: Shapes, kept: Iterable[str]) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        (cache / "done.json").unlink(missing_ok=True)  # first of all: what follows is incomplete
        for path in cache.glob("*.npy"):
            if path.stem not in kept:
                path.unlink()  # truncating an old file would crash processes that still have it mapped
        wanted = [(name, (length, *shape), np.float16) for name, shape in shapes.items()]
        for name, shape, dtype in (*wanted, (LABELS, (length,), np.int64)):
            path = cache / f"{name}.npy"
            np.lib.format.open_memmap(path, "w+", dtype, shape)
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a bus error in a memory map
                with open(path, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise UserError(f"cannot write features to {cache}: {error.strerror}") from None


def _open(cache: Path, names: Iterable[str], mode: Literal["r", "r+"]) -> Arrays:
    try:
        return {name: np.load(cache / f"{name}.npy", mmap_mode=mode) for name in (*names, LABELS)}
    except FileNotFoundError as error:
        raise UserError(f"no {error.filename}: the processes need a folder that all nodes share") from None


def _checksum(features: np.ndarray) -> int:
    """The sum of the values' bit patterns, a few rows at a time."""
    rows = max(1, (1 << 24) // max(1, features[:1].size))
    return sum(
        int(features[start : start + rows].view(np.uint16).sum(dtype=np.int64))
        for start in range(0, len(features), rows)
    )
