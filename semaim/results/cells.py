"""Cells of the results table: runs that differ only in their seed, and where they come from."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from semaim.results import Catalogue
from semaim.results.runs import Run, remarks_of

AGAIN = "one seed more than once: not averaged"

#: The origin of a figure: label in the table -> key of results.json.
ORIGIN = {
    "commit": "commit",
    "config": "config",
    "checkpoint": "checkpoint",
    "data folder": "data",
    "training images": "train_images",
    "validation images": "val_images",
    "seed": "seed",
    "hardware": "device",
    "precision": "precision",
    "date": "date",
}


@dataclass(frozen=True)
class Cell:
    """Runs that differ only in their seed, the data they were measured on, and reasons not to compare them."""

    runs: tuple[Run, ...]
    data: str
    remarks: tuple[str, ...]

    @property
    def mean(self) -> float:
        """Mean of the runs."""
        return statistics.fmean(run.value for run in self.runs)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation; None for a single run."""
        if len(self.runs) == 1:
            return None
        values = [run.value for run in self.runs]
        return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan

    @property
    def origin(self) -> dict[str, str]:
        """Labels of `ORIGIN`, and "folder" -> the values of the runs."""
        found = {name: joined(getattr(run.record, key) for run in self.runs) for name, key in ORIGIN.items()}
        if all("checkpoint" in run.record.given and not run.record.checkpoint for run in self.runs):
            found["checkpoint"] = "none"
        return found | {"folder": joined(run.folder for run in self.runs)}


def joined(values: Iterable) -> str:
    """Distinct values as text."""
    return ", ".join(dict.fromkeys("unknown" if value is None else str(value) for value in values))


def make_cells(runs: Iterable[Run], catalogue: Catalogue) -> list[Cell]:
    """Group runs that differ only in their seed."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        data, remarks = data_of(run, catalogue), remarks_of(run, catalogue)
        groups.setdefault((data, remarks, *setting_of(run)), []).append(run)
    cells = []
    for (data, remarks, *_), group in groups.items():
        by_folder: dict[str | None, list[Run]] = {}
        for run in group if repeated(group) else ():  # perhaps of two folders of one name
            by_folder.setdefault(run.record.data, []).append(run)
        for part in by_folder.values() or [group]:
            if repeated(part):  # something unrecorded differs, or it is the same run twice
                cells += [Cell((run,), data, (*remarks, AGAIN)) for run in part]
            else:
                cells.append(Cell(tuple(part), data, remarks))
    return cells


def repeated(runs: Iterable[Run]) -> bool:
    """Whether two runs have the same seed and weights."""
    return max(Counter((run.record.seed, run.record.checkpoint) for run in runs).values()) > 1


def data_of(run: Run, catalogue: Catalogue) -> str:
    """The data set's name if it is complete, else its folder's name."""
    whole = catalogue.datasets.get(run.task, catalogue.datasets["fine-tuning"])
    complete = run.record.train_images in whole.train_images and run.record.val_images == whole.val_images
    return whole.name if complete else Path(run.record.data or "data not recorded").name


def setting_of(run: Run) -> tuple:
    """Everything else recorded that a run's figure depends on, except the seed; changes are in its remarks."""
    names = ("stage", "train_images", "val_images", "pretrain_config", "pretrain_images", "precision")
    recorded = [getattr(run.record, name) for name in names] + [run.scales]
    weights = run.record.pretrain_epochs if run.identified else run.record.checkpoint
    return (run.method, run.backbone, run.task, run.metric, run.config, run.length, run.own_data, *recorded, weights)


def figure_words(cell: Cell) -> str:
    """Mean and spread as text."""
    return f"{cell.mean:.2f}" + ("" if cell.spread is None else f" ± {cell.spread:.2f}")
