"""Evaluation of frozen features: by k-NN, and by a linear probe at many learning rates.

Shapes: N images of the bank (the training images), M queries (the validation images), D channels, C classes, R learning
rates. Computation is in fp32. Accuracies are in percent. Of classes with equal scores, the one with the lower number
comes first.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from semaim.data.folder import seed_of
from semaim.engine.extraction import gather_rows, processes
from semaim.engine.watching import progress
from semaim.errors import UserError

NORM_EPS = 1e-6  #: of the probe's batch normalisation, as in MAE
MOMENTUM = 0.9
INIT_STD = 0.01  #: of the probe's weights, as in MAE and DINO

LRS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)  #: of the fast probe

Rows = np.ndarray | Tensor
Split = tuple[Rows, Rows]  #: features (N, D) and labels (N,)


def _tensor(rows: Rows, device: torch.device | str) -> Tensor:
    # Copied, as PyTorch does not support read-only arrays such as memory maps.
    return (rows if isinstance(rows, Tensor) else torch.from_numpy(np.array(rows))).to(device)


def check_rows(features: Rows, labels: Rows, classes: int) -> None:
    """`UserError` for rows without labels that fit the classes."""
    if len(features) != len(labels):
        raise ValueError(f"{len(features)} features and {len(labels)} labels")
    if not len(features):
        raise UserError("there are no features to classify")
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise UserError(f"labels {int(labels.min())} to {int(labels.max())} do not fit {classes} classes")


def rank_of(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes rank above the right one: scores (..., B, C), labels (B,) -> (..., B)."""
    labels = labels.view(-1, 1).expand(*scores.shape[:-1], 1)
    own = scores.gather(-1, labels)
    ties = (scores == own) & (torch.arange(scores.shape[-1], device=scores.device) < labels)
    return ((scores > own) | ties).sum(dim=-1)


def only(scores: Tensor, among: Sequence[int] | None) -> Tensor:
    """Scores (..., C) with -inf for the classes that are not among these; None for all classes."""
    if among is None:
        return scores
    kept = torch.full_like(scores, -torch.inf)
    places = torch.as_tensor(among, device=scores.device)
    kept[..., places] = scores[..., places]
    return kept


# k nearest neighbours


def knn_accuracy(
    bank: Rows, bank_labels: Rows, queries: Rows, labels: Rows, classes: int, *options, **more
) -> dict[int, tuple[float, float]]:
    """Top-1 and top-5 accuracy (top-C if C is below 5) for each k; arguments as for `knn_hits`."""
    hits = knn_hits(bank, bank_labels, queries, labels, classes, *options, **more)
    return {k: accuracies(found) for k, found in hits.items()}


def accuracies(hits: Tensor) -> tuple[float, float]:
    """Hits bool (M, 2) -> top-1 and top-5 accuracy."""
    top1, top5 = (100 * hits.sum(dim=0).double() / len(hits)).tolist()
    return top1, top5


@torch.no_grad()
def knn_hits(
    bank: Rows,
    bank_labels: Rows,
    queries: Rows,
    labels: Rows,
    classes: int,
    ks: Sequence[int] = (5, 10, 20, 30, 50),
    temperature: float = 0.07,
    chunk: int = 8192,
    device: torch.device | str = "cpu",
    among: Sequence[int] | None = None,
) -> dict[int, Tensor]:
    """Weighted k-NN by cosine similarity: a neighbour votes for its class with exp(similarity / temperature).

    Each process classifies queries[rank::world]; the result is over all processes. The bank is read once, `chunk` rows
    at a time.

    Args:
        bank: (N, D), may be a memory map. bank_labels: (N,).
        queries: (M, D). labels: (M,).
        classes: C.
        ks: numbers of neighbours, each evaluated.
        chunk: rows of the bank, and of the queries, that are compared at once: chunk^2 fp32 similarities in memory.
        among: the classes that can be predicted; None for all. Votes for others do not count.

    Returns:
        For each k, bool (M, 2) on the CPU: whether a query's class comes first, and whether it is among the first five.

    Source: DINO, `eval_knn.py`.
    """
    check_rows(bank, bank_labels, classes)
    check_rows(queries, labels, classes)
    most = max(ks)
    if min(ks) < 1 or most > len(bank):
        raise UserError(f"k = {most if min(ks) > 0 else min(ks)} neighbours of {len(bank)}: give 1 to {len(bank)}")
    rank, world = processes()
    own = F.normalize(_tensor(queries[rank::world], device).float(), dim=1)
    labels, bank_labels = _tensor(labels[rank::world], device), _tensor(bank_labels, device)
    blocks = [slice(start, start + chunk) for start in range(0, len(own), chunk)]

    # The `most` nearest so far. N is at least `most`, so no -inf is left at the end.
    similarity = own.new_full((len(own), most), -torch.inf)
    votes = bank_labels.new_zeros(len(own), most)
    for start in range(0, len(bank), chunk):
        progress("searching neighbours")
        part = F.normalize(_tensor(bank[start : start + chunk], device).float(), dim=1)
        for block in blocks:
            nearest, index = (own[block] @ part.T).topk(min(most, len(part)))
            nearest = torch.cat([similarity[block], nearest], dim=1)
            found = torch.cat([votes[block], bank_labels[start + index]], dim=1)
            similarity[block], index = nearest.topk(most)
            votes[block] = found.gather(1, index)

    # Relative to the nearest neighbour: it changes no ranking and cannot overflow.
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    hits = torch.zeros(len(own), len(ks), 2, dtype=torch.int32, device=own.device)
    for block in blocks:
        for i, k in enumerate(ks):
            scores = weights.new_zeros(len(labels[block]), classes)
            scores.scatter_add_(1, votes[block][:, :k], weights[block][:, :k])
            before = rank_of(only(scores, among), labels[block])
            hits[block, i] = torch.stack([before < 1, before < 5], dim=1).int()
    found = gather_rows(hits, len(queries)).bool().cpu()
    return {k: found[:, i] for i, k in enumerate(ks)}


# Linear probe


@dataclass(frozen=True)
class ProbeResult:
    """A probe's result; `held_out` is the accuracy of each learning rate on held-out training images."""

    lr: float
    top1: float
    top5: float
    held_out: dict[float, float]
    at_border: bool  #: the best learning rate is the smallest or largest of several: a better one may lie outside
    #: bool (M,), whether each query's class came first
    hits: np.ndarray = field(default_factory=lambda: np.zeros(0, bool), compare=False, repr=False)

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
    lrs: Sequence[float] = LRS,
    epochs: int = 30,
    batch: int = 1024,
    held_out: float = 0.1,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> ProbeResult:
    """Linear probe on fixed features, at the learning rate that is best on a held-out part of the bank.

    All learning rates are trained in parallel on the rest of the bank. The best one (of several, the middle one) is
    then trained anew on the whole bank and evaluated on the queries, which have no part in the choice. Uses one
    process.

    Args:
        bank: (N, D), kept on `device` in its own precision. bank_labels: (N,).
        queries: (M, D). labels: (M,).
        classes: C.
        lrs: peak learning rates of SGD on the mean loss of a batch; one that diverges counts as 0 %.
        batch: images per step.
        held_out: share of each class that chooses the learning rate.
    """
    check_rows(queries, labels, classes)
    probe = fit_probe(bank, bank_labels, classes, lrs, epochs, batch, held_out, seed, device)
    labels = _tensor(labels, device)
    [hits] = heads_hits(probe.heads, _tensor(queries, device), labels, torch.arange(len(labels)))
    return ProbeResult(probe.lr, *accuracies(hits), probe.held_out, probe.at_border, hits[:, 0].numpy())


class FittedProbe(NamedTuple):
    """One head, and how its learning rate was chosen; see `ProbeResult`."""

    heads: Heads
    lr: float
    held_out: dict[float, float]
    at_border: bool


def fit_probe(
    bank: Rows,
    bank_labels: Rows,
    classes: int,
    lrs: Sequence[float] = LRS,
    epochs: int = 30,
    batch: int = 1024,
    held_out: float = 0.1,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> FittedProbe:
    """The head of `fast_probe`, for any number of queries."""
    check_rows(bank, bank_labels, classes)
    lrs = check_probe(lrs, _tensor(bank_labels, "cpu"), held_out, epochs, batch)
    bank, bank_labels = _tensor(bank, device), _tensor(bank_labels, device)
    train, held = split_held_out(bank_labels.cpu(), held_out, seed)

    heads = train_heads(bank, bank_labels, train, classes, lrs, epochs, batch, seed)
    chosen_by = [accuracies(hits)[0] for hits in heads_hits(heads, bank, bank_labels, held)]
    best = best_rate(lrs, chosen_by)

    heads = train_heads(bank, bank_labels, torch.arange(len(bank)), classes, [lrs[best]], epochs, batch, seed)
    at_border = len(lrs) > 1 and best in (0, len(lrs) - 1)
    return FittedProbe(heads, lrs[best], dict(zip(lrs, chosen_by, strict=True)), at_border)


def best_rate(lrs: Sequence[float], scores: Sequence[float]) -> int:
    """The place of the best of rising learning rates by their accuracies on held-out images; of several the middle."""
    if not any(scores):
        raise UserError(f"no learning rate from {lrs[0]:g} to {lrs[-1]:g} gets any held-out image right: try others")
    tied = [place for place, score in enumerate(scores) if score == max(scores)]
    return tied[len(tied) // 2]


def check_probe(lrs: Sequence[float], labels: Tensor, held_out: float, epochs: int, batch: int) -> list[float]:
    """The learning rates in rising order; `UserError` for these, a held-out share or a length that cannot work."""
    if not lrs or not all(isinstance(lr, int | float) and 0 < lr < math.inf for lr in lrs):
        raise UserError(f"learning rates {list(lrs)}: give one or more above 0")
    if not all(type(number) is int and number > 0 for number in (epochs, batch)):
        raise UserError(f"a probe of {epochs!r} epochs in batches of {batch!r}: give whole numbers from 1")
    split_held_out(labels, held_out, 0)
    return sorted(set(map(float, lrs)))


def split_held_out(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on, and held-out rows: `share` of each class, at least one, but never all; labels (N,)."""
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
    """Rows of each step (B,): shuffled anew every epoch, without an incomplete last batch."""
    batch = min(batch, len(rows))
    for epoch in range(epochs):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed_of(seed, epoch)))
        for part in rows[order[: len(rows) // batch * batch]].split(batch):
            progress(f"epoch {epoch + 1} of a probe")
            yield part


@torch.no_grad()
def train_heads(
    bank: Tensor, labels: Tensor, rows: Tensor, classes: int, lrs: Sequence[float], epochs: int, batch: int, seed: int
) -> Heads:
    """One linear head per learning rate, with the same initial weights: cross-entropy, SGD, cosine to 0 over all steps.

    bank (N, D) and labels (N,) are on one device; rows (n,) to train on are on the CPU, and their mean and variance
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
        # Gradient of the mean cross-entropy by the logits, (R, B, C). Heads share nothing: none affects another.
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
def heads_hits(
    heads: Heads, features: Tensor, labels: Tensor, rows: Tensor, among: Sequence[int] | None = None
) -> Tensor:
    """Whether the class of rows (m,) of features (M, D) comes first, and is among the first five: bool (R, m, 2).

    On the CPU. Only the classes `among` these can be predicted, None for all. A head whose logits are not finite is
    never right.
    """
    hits, finite = [], torch.ones(len(heads.weight), 1, 1, dtype=torch.bool, device=features.device)
    for part in rows.to(features.device).split(4096):
        logits = heads.standardise(features[part]) @ heads.weight + heads.bias[:, None]
        finite &= logits.isfinite().flatten(1).all(dim=1).view(-1, 1, 1)
        before = rank_of(only(logits, among), labels[part])
        hits.append(torch.stack([before < 1, before < 5], dim=2))
    return (torch.cat(hits, dim=1) & finite).cpu()
