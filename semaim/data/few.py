"""Which few training images have labels: drawn by a seed, or listed in a file.

Shapes: N training images.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from semaim.data.folder import seed_of
from semaim.data.labelled import LabelledImages
from semaim.data.shards import inner_name
from semaim.errors import UserError


def draw_ranks(labels: Tensor, seed: int, draw: int) -> Tensor:
    """The place of each image in a random order of its class: int64 (N,), from 0; labels (N,).

    It depends on the seed, the draw, the class and the order of the class's images, which is that of their names. The
    images of rank below k are k per class, and those for k + 1 contain them.
    """
    ranks = torch.empty_like(labels)
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten()
        generator = torch.Generator().manual_seed(seed_of(seed, draw, label))
        ranks[rows[torch.randperm(len(rows), generator=generator)]] = torch.arange(len(rows))
    return ranks


def share_of_each(labels: Tensor, ranks: Tensor, share: float) -> Tensor:
    """Rows of a share of each class, rounded, at least one: int64 (n,), rising; labels and ranks (N,)."""
    wanted = (labels.bincount() * share).round().clamp(min=1).long()
    return (ranks < wanted[labels]).nonzero().flatten()


def read_list(file: str | os.PathLike, images: LabelledImages) -> Tensor:
    """Rows of the training images that a text file names, one per line: int64 (n,), rising.

    A line is the file's name, or as many of its folders and the name as tell it apart. SimCLR's lists of 1 % and 10 %
    of ImageNet, 1percent.txt and 10percent.txt, are such files.

    Raises:
        UserError: the file cannot be read or is empty, or a name is missing, ambiguous or given twice.
    """
    path = Path(file)
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no text file"
        raise UserError(f"cannot read the list {path}: {reason}") from None
    wanted = [line for line in lines if line]
    if not wanted:
        raise UserError(f"the list {path} is empty")
    names = [Path(inner_name(name)) for name in images.names()]
    by_name: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        by_name.setdefault(name.name, []).append(row)
    rows: list[int] = []
    for line in wanted:
        parts = Path(line).parts
        found = [row for row in by_name.get(Path(line).name, []) if names[row].parts[-len(parts) :] == parts]
        if not found:
            raise UserError(f"{path} names {line}, which is no image in {Path(images.root) / 'train'}")
        if len(found) > 1:
            raise UserError(
                f"{path} names {line}, which are {len(found)} images, such as {names[found[1]]}: add folders"
            )
        rows += found
    if len(set(rows)) < len(rows):
        again = next(row for place, row in enumerate(rows) if row in rows[:place])
        raise UserError(f"{path} names {names[again]} twice")
    return torch.tensor(sorted(rows))


def check_every_class(rows: Tensor, labels: np.ndarray | Tensor, classes: Sequence[str], origin: str) -> None:
    """`UserError` if a class has none of the rows."""
    counts = torch.as_tensor(labels)[rows].bincount(minlength=len(classes))
    if int(counts.min()) == 0:
        raise UserError(f"{origin} has no image of class {classes[int(counts.argmin())]}")
