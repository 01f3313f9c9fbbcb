"""Features of a frozen encoder: extracted once, then judged by k-NN and by a linear probe of many learning rates.

Shapes: N images of the bank (the training images), M queries (the validation images), D channels, C classes, R learning
rates. Features are fp16 where they are kept and fp32 where they are computed with. Accuracies are in per cent. Where
several classes score the same, the one of lower number comes first.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from semaim.data.folder import seed_of
from semaim.errors import UserError

NORM_EPS = 1e-6  #: of the probe's batch normalisation, as in MAE
MOMENTUM = 0.9
INIT_STD = 0.01  #: of the probe's weights, as in MAE and DINO

Rows = np.ndarray | Tensor
Split = tuple[Rows, Rows]  #: features (N, D) and labels (N,)


def processes() -> tuple[int, int]:
    """Rank of this process and number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def reduce_sum(values: Tensor) -> Tensor:
    """Sum over the processes, the same on each; `values` itself where there is one. It waits for all of them."""
    if processes()[1] == 1:
        return values
    total = values.cuda() if dist.get_backend() == "nccl" else values
    total = total.clone()
    dist.all_reduce(total)
    return total.to(values.device)


# Extraction


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
        encode: images (B, 3, H, W) -> features (B, D), of a network in eval mode; runs without gradient.
        loader: gives this process's share of the images, each once: dicts of `image`, float (B, 3, H, W), and `label`
            and `index`, int64 (B,).
        length, width: N and D.
        device: where the images go before `encode`.
        cache: folder of `features.npy`, `labels.npy` and `done.json`, on a file system that all processes share; None
            keeps the features in memory, of one process only.
        key: names the weights, data, transform and pooling. Finished files of the same key are read, not made again.
        log: gets lines of progress.

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
            reduce_sum(torch.tensor(0))  # a quick process must not write anew what another has yet to open
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

    if cache is not None:
        features.flush()
        labels.flush()
    # From here on all processes know the same, so that all raise or none.
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

    # Nodes that do not share their files, or write back whole pages of them (NFS), lose one another's rows.
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
        (cache / "done.json").unlink(missing_ok=True)  # before anything else: what follows is unfinished
        for name, shape, dtype in (("features", (length, width), np.float16), ("labels", (length,), np.int64)):
            path = cache / f"{name}.npy"
            path.unlink(missing_ok=True)  # a new file: to cut the old one would kill whoever still has it mapped
            np.lib.format.open_memmap(path, "w+", dtype, shape)
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a bus error in a memory map
                with open(path, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise UserError(f"cannot write features to {cache}: {error.strerror}") from None


def _open(cache: Path, mode: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        return tuple(np.load(cache / f"{name}.npy", mmap_mode=mode) for name in ("features", "labels"))
    except FileNotFoundError as error:
        raise UserError(f"no {error.filename}: the processes need a folder that all nodes share") from None


def _checksum(features: np.ndarray) -> int:
    return int(features.view(np.uint16).sum(dtype=np.int64))


def _tensor(rows: Rows, device: torch.device | str) -> Tensor:
    # Copied, as tensors over read-only memory maps are not allowed.
    return (rows if isinstance(rows, Tensor) else torch.from_numpy(np.array(rows))).to(device)


def _check(features: Rows, labels: Rows, classes: int) -> None:
    if len(features) != len(labels):
        raise ValueError(f"{len(features)} features and {len(labels)} labels")
    if not len(features):
        raise UserError("there are no features to classify")
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise UserError(f"labels {int(labels.min())} to {int(labels.max())} do not fit {classes} classes")


def _rank(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the right one: scores (..., B, C), labels (B,) -> (..., B)."""
    labels = labels.view(-1, 1).expand(*scores.shape[:-1], 1)
    own = scores.gather(-1, labels)
    ties = (scores == own) & (torch.arange(scores.shape[-1], device=scores.device) < labels)
    return ((scores > own) | ties).sum(dim=-1)


# k nearest neighbours


@torch.no_grad()
def knn_accuracy(
    bank: Rows,
    bank_labels: Rows,
    queries: Rows,
    labels: Rows,
    classes: int,
    ks: Sequence[int] = (5, 10, 20, 30, 50),
    temperature: float = 0.07,
    chunk: int = 8192,
    device: torch.device | str = "cpu",
) -> dict[int, tuple[float, float]]:
    """Weighted k-NN by cosine similarity: a neighbour votes for its class with exp(similarity / temperature).

    Each process classifies queries[rank::world], and the result is that of all. The bank is read once, `chunk` rows at
    a time.

    Args:
        bank: (N, D), may be a memory map. bank_labels: (N,).
        queries: (M, D). labels: (M,).
        classes: C.
        ks: numbers of neighbours, each judged.
        chunk: rows of the bank, and of the queries, that are compared at once: chunk^2 fp32 similarities in memory.

    Returns:
        For each k, top-1 and top-5 accuracy (top-C where C is below 5).

    Source: DINO, `eval_knn.py`.
    """
    _check(bank, bank_labels, classes)
    _check(queries, labels, classes)
    most = max(ks)
    if min(ks) < 1 or most > len(bank):
        raise UserError(f"k = {most if min(ks) > 0 else min(ks)} neighbours of {len(bank)}: give 1 to {len(bank)}")
    rank, world = processes()
    own = F.normalize(_tensor(queries[rank::world], device).float(), dim=1)
    labels, bank_labels = _tensor(labels[rank::world], device), _tensor(bank_labels, device)
    blocks = [slice(start, start + chunk) for start in range(0, len(own), chunk)]

    # The `most` nearest so far. N is at least that, so no -inf is left at the end.
    similarity = own.new_full((len(own), most), -torch.inf)
    votes = bank_labels.new_zeros(len(own), most)
    for start in range(0, len(bank), chunk):
        part = F.normalize(_tensor(bank[start : start + chunk], device).float(), dim=1)
        for block in blocks:
            nearest, index = (own[block] @ part.T).topk(min(most, len(part)))
            nearest = torch.cat([similarity[block], nearest], dim=1)
            found = torch.cat([votes[block], bank_labels[start + index]], dim=1)
            similarity[block], index = nearest.topk(most)
            votes[block] = found.gather(1, index)

    # Relative to the nearest, which changes no ranking and cannot overflow.
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    hits = torch.zeros(len(ks), 2, dtype=torch.int64, device=own.device)
    for block in blocks:
        for i, k in enumerate(ks):
            scores = weights.new_zeros(len(labels[block]), classes)
            scores.scatter_add_(1, votes[block][:, :k], weights[block][:, :k])
            before = _rank(scores, labels[block])
            hits[i] += torch.stack([(before < 1).sum(), (before < 5).sum()])
    accuracies = (100 * reduce_sum(hits).double().cpu() / len(queries)).tolist()
    return {k: tuple(both) for k, both in zip(ks, accuracies, strict=True)}


# Linear probe


@dataclass(frozen=True)
class ProbeResult:
    """A probe's outcome: `held_out` is the accuracy of every learning rate on held-out training images."""

    lr: float
    top1: float
    top5: float
    held_out: dict[float, float]
    at_border: bool  #: the best learning rate is the smallest or the largest of several: a better one may lie outside

    def __str__(self) -> str:
        text = f"top-1 {self.top1:.2f} %, top-5 {self.top5:.2f} % with lr {self.lr:g}"
        if not self.at_border:
            return text
        smallest = self.lr == min(self.held_out)
        return text + (", the smallest tried: try smaller ones" if smallest else ", the largest tried: try larger ones")


class Heads(NamedTuple):
    """R linear heads on features standardised as (features - mean) * scale."""

    weight: Tensor  # (R, D, C)
    bias: Tensor  # (R, C)
    mean: Tensor  # (D,)
    scale: Tensor  # (D,)

    def standardise(self, features: Tensor) -> Tensor:
        """Features (B, D) -> (B, D) fp32."""
        return (features.float() - self.mean) * self.scale


def fast_probe(
    bank: Rows,
    bank_labels: Rows,
    queries: Rows,
    labels: Rows,
    classes: int,
    lrs: Sequence[float] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10),
    epochs: int = 30,
    batch: int = 1024,
    held_out: float = 0.1,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> ProbeResult:
    """Linear probe on fixed features, at the learning rate that is best on a held-out part of the bank.

    All learning rates are trained side by side on the rest of the bank. The best one - the middle one where several
    are best - is then trained anew on the whole bank, and judged on the queries, which choose nothing. In one process.

    Args:
        bank: (N, D), kept on `device` in its own precision. bank_labels: (N,).
        queries: (M, D). labels: (M,).
        classes: C.
        lrs: peak learning rates of SGD on the mean loss of a batch; one that diverges counts as 0 %.
        batch: images per step.
        held_out: share of each class that chooses the learning rate.
    """
    _check(bank, bank_labels, classes)
    _check(queries, labels, classes)
    lrs = sorted(set(map(float, lrs)))
    if not lrs or lrs[0] <= 0:
        raise UserError(f"learning rates {lrs}: give one or more above 0")
    bank, bank_labels, labels = _tensor(bank, device), _tensor(bank_labels, device), _tensor(labels, device)
    train, held = split_held_out(bank_labels.cpu(), held_out, seed)

    heads = train_heads(bank, bank_labels, train, classes, lrs, epochs, batch, seed)
    accuracies = [top1 for top1, _ in score_heads(heads, bank, bank_labels, held)]
    if not any(accuracies):
        raise UserError(f"no learning rate from {lrs[0]:g} to {lrs[-1]:g} gets any held-out image right: try others")
    tied = [i for i, accuracy in enumerate(accuracies) if accuracy == max(accuracies)]
    best = tied[len(tied) // 2]

    everything = torch.arange(len(bank))
    heads = train_heads(bank, bank_labels, everything, classes, [lrs[best]], epochs, batch, seed)
    [(top1, top5)] = score_heads(heads, _tensor(queries, device), labels, torch.arange(len(labels)))
    at_border = len(lrs) > 1 and best in (0, len(lrs) - 1)
    return ProbeResult(lrs[best], top1, top5, dict(zip(lrs, accuracies, strict=True)), at_border)


def split_held_out(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows held out: `share` of each class, at least one, but never its last; labels (N,)."""
    if not 0 < share < 1:
        raise UserError(f"a share of {share:g} cannot be held out: give one between 0 and 1")
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed_of(seed)))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    sizes = torch.bincount(labels)
    held_sizes = (sizes * share).round().long().clamp(min=1).minimum((sizes - 1).clamp(min=0))
    classes = labels[by_class]
    place = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[classes]
    held = place < held_sizes[classes]
    if not held.any():
        raise UserError("no class has two training images: none can be held out to choose the learning rate")
    return by_class[~held].sort().values, by_class[held].sort().values


def probe_batches(rows: Tensor, epochs: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Rows of each step (B,): every epoch a new shuffle, without the images that fill no batch."""
    batch = min(batch, len(rows))
    for epoch in range(epochs):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed_of(seed, epoch)))
        yield from rows[order[: len(rows) // batch * batch]].split(batch)


@torch.no_grad()
def train_heads(
    bank: Tensor, labels: Tensor, rows: Tensor, classes: int, lrs: Sequence[float], epochs: int, batch: int, seed: int
) -> Heads:
    """One linear head per learning rate, from the same weights: cross-entropy, SGD, cosine to 0 over all steps.

    bank (N, D) and labels (N,) on one device; rows (n,) on the CPU are those to train on, and their mean and variance
    standardise the features. Batches are those of `probe_batches`.
    """
    device, width, count = bank.device, bank.shape[1], len(lrs)
    total, squares = bank.new_zeros(2, width, dtype=torch.float64)
    for part in rows.to(device).split(65536):
        values = bank[part].double()
        total += values.sum(dim=0)
        squares += values.square().sum(dim=0)
    mean = total / len(rows)
    scale = ((squares / len(rows) - mean.square()).clamp(min=0) + NORM_EPS).rsqrt()

    weight = torch.randn(width, classes, generator=torch.Generator().manual_seed(seed)) * INIT_STD
    weight = weight.to(device).repeat(count, 1, 1)
    heads = Heads(weight, weight.new_zeros(count, classes), mean.float(), scale.float())
    rates, velocity = torch.tensor(lrs, device=device), [torch.zeros_like(p) for p in heads[:2]]
    steps = epochs * (len(rows) // min(batch, len(rows)))
    for step, part in enumerate(probe_batches(rows, epochs, batch, seed)):
        part = part.to(device)
        features = heads.standardise(bank[part])
        # Gradient of the mean cross-entropy by the logits, (R, B, C). Heads share no number: none spoils another.
        error = (features @ heads.weight + heads.bias[:, None]).softmax(dim=-1)
        error[:, torch.arange(len(part), device=device), labels[part]] -= 1
        error /= len(part)
        rate = rates * (0.5 * (1 + math.cos(math.pi * step / steps)))
        gradients = features.T @ error, error.sum(dim=1)
        for parameter, moving, gradient in zip(heads[:2], velocity, gradients, strict=True):
            moving.mul_(MOMENTUM).add_(gradient)
            parameter.sub_(rate.view(-1, *[1] * (parameter.dim() - 1)) * moving)
    return heads


@torch.no_grad()
def score_heads(heads: Heads, features: Tensor, labels: Tensor, rows: Tensor) -> list[tuple[float, float]]:
    """Top-1 and top-5 accuracy of each head on some rows (m,) of features (M, D); 0 where its logits are not finite."""
    hits = torch.zeros(len(heads.weight), 2, dtype=torch.int64, device=features.device)
    finite = torch.ones(len(heads.weight), 1, dtype=torch.bool, device=features.device)
    for part in rows.to(features.device).split(4096):
        logits = heads.standardise(features[part]) @ heads.weight + heads.bias[:, None]
        finite &= logits.isfinite().all(dim=-1).all(dim=-1, keepdim=True)
        before = _rank(logits, labels[part])
        hits += torch.stack([(before < 1).sum(dim=1), (before < 5).sum(dim=1)], dim=1)
    return [tuple(both) for both in (100 * (hits * finite).double().cpu() / len(rows)).tolist()]
