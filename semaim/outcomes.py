"""`outcomes.npz`: how each validation image fared in a run, beside results.json; what a paired bootstrap needs."""

import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from semaim.errors import UserError

FILE = "outcomes.npz"  #: in a run's work folder
LARGEST = 2**29  #: bytes of its arrays; 50,000 images with the sums of 150 classes have a ninth
NAMES = "names"  #: its array of the images' names; all others are named after a metric


@dataclass(frozen=True)
class Outcomes:
    """Per validation image, what a metric is the mean of.

    Args:
        names: (M,), each image's path relative to the data's folder.
        scores: key of the metric in results.json -> float32 (M,) or, for a ratio of sums, (M, C, 2).
    """

    names: np.ndarray
    scores: Mapping[str, np.ndarray]


def write_outcomes(folder: Path, names: Sequence[str], scores: Mapping[str, np.ndarray]) -> None:
    """Write them atomically; M names, and scores of shape (M,), whose mean times 100 is the metric in percent.

    Scores of shape (M, C, 2) are numerators and denominators of C classes, such as intersections and unions: the metric
    is the mean over the classes of the ratio of their sums.
    """
    arrays: dict[str, Any] = {NAMES: np.array(list(names), dtype=np.str_)}
    for key, rows in scores.items():
        if key == NAMES or len(rows) != len(names):
            raise ValueError(f"{len(rows)} outcomes of {key} for {len(names)} images")
        arrays[key] = np.asarray(rows, dtype=np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".outcomes.partial"
    with open(partial, "wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(partial, folder / FILE)


def read_outcomes(folder: Path) -> Outcomes | None:
    """A run's outcomes; None if it kept none, `UserError` if the file is broken."""
    path = folder / FILE
    if not os.path.lexists(path):
        return None
    try:
        if not path.is_file():  # opening a FIFO would wait for ever
            raise ValueError("it is no regular file")
        with zipfile.ZipFile(path) as archive:  # a member never gives more than the size that is recorded for it
            if sum(info.file_size for info in archive.infolist()) > LARGEST:
                raise ValueError(f"it unpacks to more than {LARGEST:,} bytes")
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        names = arrays.pop(NAMES)
    except Exception as error:  # zip, zlib, memory and header errors are of many types
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise UserError(f"{path} is broken: {reason}; remove it, or measure again") from None
    if names.ndim != 1 or names.dtype.kind != "U":
        raise UserError(f"{path} is broken: it has no list of names; remove it, or measure again")
    if any(rows.ndim not in (1, 3) or len(rows) != len(names) or rows.dtype != np.float32 for rows in arrays.values()):
        raise UserError(f"{path} is broken: its arrays do not fit its {len(names)} images")
    return Outcomes(names, arrays)
