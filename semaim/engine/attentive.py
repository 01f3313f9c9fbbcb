"""An attentive probe on stored tokens, at several learning rates; `features.fast_probe` is its linear counterpart.

Shapes: N training images, M validation images, T = P + L tokens of D channels, P of them before the patches; R learning
rates.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semaim.engine.features import (
    ProbeResult,
    Rows,
    accuracies,
    best_rate,
    check_probe,
    check_rows,
    probe_batches,
    rank_of,
    split_held_out,
)
from semaim.engine.optim import Lars
from semaim.errors import UserError
from semaim.models.attentive import ATTENTIVE, attentive_head, tokens_read

LRS = (1, 3, 10, 30, 100)  #: of the fast attentive probe


class Tokens:
    """Stored tokens, of which a batch at a time is read as the probe reads them.

    Args:
        rows: (N, T, D), may be a memory map.
        labels: (N,).
        pool: a name of `ATTENTIVE`, which says what is read.
        prefix: P.
        device: of the batches.
    """

    def __init__(self, rows: Rows, labels: Rows, pool: str, prefix: int, device: torch.device | str):
        self.rows, self.labels = rows, torch.from_numpy(np.asarray(labels).copy())
        self.pool, self.prefix, self.device = pool, prefix, device

    def read(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens fp32 (B, T', D) and labels (B,) of the images `index` (B,), on the device."""
        rows = self.rows[index] if isinstance(self.rows, Tensor) else torch.from_numpy(self.rows[index.numpy()])
        read = tokens_read(self.pool, rows.to(self.device).float(), self.prefix)
        return read, self.labels[index].to(self.device)


def make_heads(
    count: int, pool: str, width: int, classes: int, seed: int, options: Mapping[str, Any]
) -> list[nn.Sequential]:
    """`count` heads with the same initial weights, drawn by the seed; `UserError` for options that do not fit."""
    if pool not in ATTENTIVE:
        raise UserError(f"fast attentive probe: pool {pool!r}: choose from {', '.join(ATTENTIVE)}")
    heads = []
    for _ in range(count):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            try:
                heads.append(attentive_head(pool, width, classes, **options))
            except (TypeError, ValueError) as error:
                raise UserError(f"fast attentive probe: {error}") from None
    return heads


def fast_attentive(
    bank: Rows,
    bank_labels: Rows,
    queries: Rows,
    labels: Rows,
    classes: int,
    pool: str = "ep",
    prefix: int = 1,
    lrs: Sequence[float] = LRS,
    epochs: int = 30,
    batch: int = 256,
    held_out: float = 0.1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    head: Mapping[str, Any] | None = None,
) -> ProbeResult:
    """Attentive probe on fixed tokens, at the learning rate that is best on a held-out part of the bank.

    All learning rates are trained on the rest of the bank. The best one (of several, the middle one) is then trained
    anew on the whole bank and evaluated on the queries, which have no part in the choice. Uses one process.

    Args:
        bank: (N, T, D), may be a memory map, of which a batch is read at a time. bank_labels: (N,).
        queries: (M, T, D), likewise. labels: (M,).
        classes: number of classes.
        pool: a name of `ATTENTIVE`.
        prefix: P.
        lrs: peak learning rates of LARS; one that diverges counts as 0 %.
        batch: images per step.
        held_out: share of each class that chooses the learning rate.
        head: further arguments of `attentive_head`: queries, d_out, heads.
    """
    check_rows(bank, bank_labels, classes)
    check_rows(queries, labels, classes)
    train, test = (Tokens(*part, pool, prefix, device) for part in ((bank, bank_labels), (queries, labels)))
    rates = check_probe(lrs, train.labels, held_out, epochs, batch)
    chosen, held = split_held_out(train.labels, held_out, seed)

    def trained(rows: Tensor, rates: Sequence[float]) -> list[nn.Sequential]:
        heads = make_heads(len(rates), pool, bank.shape[-1], classes, seed, head or {})
        train_attentive([head.to(device) for head in heads], train, rows, rates, epochs, batch, seed)
        return heads

    scores = [accuracies(hits)[0] for hits in attentive_hits(trained(chosen, rates), train, held)]
    best = best_rate(rates, scores)
    final = trained(torch.arange(len(train.labels)), [rates[best]])
    [hits] = attentive_hits(final, test, torch.arange(len(test.labels)))
    at_border = len(rates) > 1 and best in (0, len(rates) - 1)
    by_rate = dict(zip(rates, scores, strict=True))
    return ProbeResult(rates[best], *accuracies(hits), by_rate, at_border, hits[:, 0].numpy())


def train_attentive(
    heads: Sequence[nn.Module], tokens: Tokens, rows: Tensor, lrs: Sequence[float], epochs: int, batch: int, seed: int
) -> None:
    """Train a head per learning rate on the images `rows` (n,): cross-entropy, LARS, cosine to 0 over all steps.

    All see the same batches, those of `probe_batches`. There is no weight decay; LARS adapts the rates of everything
    but biases, as in the published linear and attentive probes.
    """
    optimizers: list[Any] = []
    for head, lr in zip(heads, lrs, strict=True):
        head.train()
        optimizers.append(Lars([{"params": list(head.parameters())}], lr=lr))
    steps = epochs * (len(rows) // min(batch, len(rows)))
    for step, part in enumerate(probe_batches(rows, epochs, batch, seed)):
        read, labels = tokens.read(part)
        share = 0.5 * (1 + math.cos(math.pi * step / steps))
        for head, optimizer, lr in zip(heads, optimizers, lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * share
            optimizer.zero_grad()
            F.cross_entropy(head(read), labels).backward()
            optimizer.step()


@torch.no_grad()
def attentive_hits(heads: Sequence[nn.Module], tokens: Tokens, rows: Tensor) -> Tensor:
    """Whether the class of the images `rows` (m,) comes first, and is among the first five: bool (R, m, 2), on the CPU.

    A head whose logits are not finite is never right.
    """
    hits, finite = [], torch.ones(len(heads), 1, 1, dtype=torch.bool)
    for head in heads:
        head.eval()
    for part in rows.split(1024):
        read, labels = tokens.read(part)
        logits = torch.stack([head(read) for head in heads])
        finite &= logits.isfinite().flatten(1).all(dim=1).view(-1, 1, 1).cpu()
        before = rank_of(logits, labels)
        hits.append(torch.stack([before < 1, before < 5], dim=2).cpu())
    return torch.cat(hits, dim=1) & finite
