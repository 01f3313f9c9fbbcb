"""Features of a frozen encoder, extracted once by all processes and stored in files.

Shapes: N images, D channels. Stored features are fp16.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from semaim.errors import UserError


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


def extract_features(
    encode: Callable[[Tensor], Tensor],
    loader: Iterable[dict[str, Tensor]],
    length: int,
    width: int,
    device: torch.device | str,
    cache: str | os.PathLike | None = None,
    key: str = "",
    log: Callable[[str], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of a whole data set, on every process.

    Args:
        encode: images (B, 3, H, W) -> features (B, D), of a network in eval mode; called without gradient.
        loader: yields this process's share of the images, each once: dicts of `image`, float (B, 3, H, W), and `label`
            and `index`, int64 (B,).
        length, width: N and D.
        device: of the images given to `encode`.
        cache: folder of `features.npy`, `labels.npy` and `done.json`, on a file system that all processes share; None
            keeps the features in memory, for one process only.
        key: identifies the weights, data, transform and pooling. Complete files with the same key are reused.
        log: called with lines of progress.

    Returns:
        features: (N, D) fp16, with a cache a read-only memory map. labels: (N,) int64.
    """
    rank, world = processes()
    stamp = {"key": key, "length": length, "width": width}
    if cache is None:
        if world > 1:
            raise UserError(f"{world} processes hand each other features in files: name a folder for them (cache)")
        features, labels = np.zeros((length, width), np.float16), np.zeros(length, np.int64)
    else:
        if not key:
            raise ValueError("a cache needs a key that names what is in it")
        cache = Path(cache)
        reuse = rank == 0 and _is_finished(cache, stamp)
        if rank == 0 and not reuse:
            _allocate(cache, length, width)
        # Rank 0 decides for all; and no other process opens the files before they are there.
        if reduce_sum(torch.tensor(int(reuse))):
            if log:
                log(f"{length} features read from {cache}")
            opened = _open(cache, "r")
            reduce_sum(torch.tensor(0))  # a fast process must not rewrite what another has yet to open
            return opened
        features, labels = _open(cache, "r+")

    count, broken, written, done = torch.zeros(length, dtype=torch.int32), 0, 0, 0
    for step, batch in enumerate(loader):
        with torch.no_grad():
            encoded = encode(batch["image"].to(device, non_blocking=True))
        index = batch["index"].cpu()
        if encoded.shape != (len(index), width):
            raise ValueError(f"encode gave {tuple(encoded.shape)} in place of {(len(index), width)}")
        if len(outside := index[(index < 0) | (index >= length)]):
            raise UserError(f"the loader's image {int(outside[0])} is none of 0 to {length - 1}")
        half = encoded.half().cpu()
        broken += int((~half.isfinite()).any(dim=1).sum())
        features[index.numpy()] = half.numpy()
        labels[index.numpy()] = batch["label"].cpu().numpy()
        count.index_add_(0, index, torch.ones(len(index), dtype=torch.int32))
        written += _checksum(half.numpy())
        done += len(index)
        if log and step % 100 == 99:
            log(f"features of {min(done * world, length)} of {length} images")

    for rows in (features, labels):
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
        return features, labels

    # Nodes that do not share files, or write back whole pages of them (NFS), lose each other's rows.
    features, labels = _open(cache, "r")
    if reduce_sum(torch.tensor(int(_checksum(features) != written))):
        raise UserError(f"{cache} does not hold what the processes wrote: name a folder that all nodes share")
    if rank == 0:
        partial = cache / f".done.json.{os.getpid()}.partial"
        partial.write_text(json.dumps(stamp))
        os.replace(partial, cache / "done.json")
    if log:
        log(f"{length} features written to {cache}")
    return features, labels


def _is_finished(cache: Path, stamp: dict) -> bool:
    try:
        features, labels = _open(cache, "r")
        finished = json.loads((cache / "done.json").read_text())
    except (OSError, ValueError, UserError):
        return False
    return finished == stamp and features.shape == (stamp["length"], stamp["width"]) and len(labels) == len(features)


def _allocate(cache: Path, length: int, width: int) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        (cache / "done.json").unlink(missing_ok=True)  # first of all: what follows is incomplete
        for name, shape, dtype in (("features", (length, width), np.float16), ("labels", (length,), np.int64)):
            path = cache / f"{name}.npy"
            path.unlink(missing_ok=True)  # truncating the old file would crash processes that still have it mapped
            np.lib.format.open_memmap(path, "w+", dtype, shape)
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a bus error in a memory map
                with open(path, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise UserError(f"cannot write features to {cache}: {error.strerror}") from None


def _open(cache: Path, mode: Literal["r", "r+"]) -> tuple[np.ndarray, np.ndarray]:
    try:
        return tuple(np.load(cache / f"{name}.npy", mmap_mode=mode) for name in ("features", "labels"))
    except FileNotFoundError as error:
        raise UserError(f"no {error.filename}: the processes need a folder that all nodes share") from None


def _checksum(features: np.ndarray) -> int:
    return int(features.view(np.uint16).sum(dtype=np.int64))
