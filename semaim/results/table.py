"""The results table: our runs next to published figures.

Runs that differ only in their seed form one cell: mean and sample standard deviation. A cell is in the row of a
published figure, with the difference, only if method, backbone, pretraining, data, recipe and length are recorded and
the same. Every other cell has its own row, which says why it is not compared.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from semaim.errors import UserError
from semaim.results import Catalogue, Published
from semaim.results.runs import Run, find_results, read_runs, remarks_of

HEADER = (
    *("Method", "Backbone", "Pretraining epochs", "Task", "Metric", "Recipe", "Published", "Ours", "Difference"),
    *("Remark", "Origin"),
)
MARKS = {"read": "", "derived": " (derived)", "remembered": " (from memory)"}
SPREAD = "Ours: mean ± sample standard deviation over n runs that differ only in their seed; percent."
PRETRAINING = "pretraining's "  #: prefix of a changed option in `Run.changes`
NOTHING = "nothing published to compare with"

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


@dataclass(frozen=True)
class Row:
    """A published figure, a cell of ours, or both if they may be compared."""

    published: Published | None
    cell: Cell | None

    @property
    def difference(self) -> float | None:
        """Ours minus the published figure."""
        if not self.published or not self.cell or self.published.value is None:
            return None
        return self.cell.mean - self.published.value

    @property
    def first(self) -> Run:
        """The first of our runs."""
        if self.cell is None:
            raise ValueError("a row of a published figure alone has no run of ours")
        return self.cell.runs[0]

    @property
    def section(self) -> tuple[str, str]:
        """Task and metric."""
        it = self.published or self.first
        return it.task, it.metric

    def labels(self) -> dict[str, str]:
        """The labels of the row, by the columns of `HEADER` up to the recipe, and the data."""
        if self.published:
            data, recipe = self.published.data, self.published.recipe or "not stated"
            pretrained = self.published.pretrain_epochs
            epochs = "not stated" if pretrained is None else str(pretrained)
        else:
            run, data = self.first, self.cell.data if self.cell else ""
            recipe = run.recipe.name if run.recipe else run.config or "not recorded"
            unknown = "not recorded" if run.record.checkpoint or run.record.method else "none"
            epochs = str(run.record.pretrain_epochs) if run.record.pretrain_epochs is not None else unknown
        it = self.published or self.first
        words = (it.method, it.backbone or "not recorded", epochs, it.task, it.metric, recipe)
        return dict(zip(HEADER, words, strict=False)) | {"Data": data}


@dataclass(frozen=True)
class Table:
    """Rows, and their warnings."""

    rows: list[Row]
    notes: list[str]


def joined(values: Iterable) -> str:
    """Distinct values as text."""
    return ", ".join(dict.fromkeys("unknown" if value is None else str(value) for value in values))


def make_table(folders: Iterable[str | Path], catalogue: Catalogue, published: bool = True) -> Table:
    """Everything measured in the folders, and the published figures of the same tasks."""
    runs = [run for path in find_results(folders) for run in read_runs(path, catalogue)]
    if not runs:
        raise UserError("the results found hold no figure that the table has, such as top1, mIoU or coco/bbox_mAP")
    cells = make_cells(runs, catalogue)
    figures = [f for f in catalogue.figures if published and any(f.task == run.task for run in runs)]
    rows = []
    for figure in figures:
        rows += [Row(figure, cell) for cell in cells if comparable(cell, figure)] or [Row(figure, None)]
    alone = [cell for cell in cells if not any(cell is row.cell for row in rows)]
    if published:
        alone = [replace(cell, remarks=cell.remarks or (NOTHING,)) for cell in alone]
    rows += [Row(None, cell) for cell in alone]
    measures = [(figure.task, figure.metric) for figure in figures] + [(run.task, run.metric) for run in runs]
    sections = list(dict.fromkeys(measures))
    tasks = list(dict.fromkeys(task for task, _ in sections))
    rows.sort(key=lambda row: (tasks.index(row.section[0]), sections.index(row.section)))
    return Table(rows, list(dict.fromkeys(note for figure in figures for note in figure.notes)))


def make_cells(runs: Iterable[Run], catalogue: Catalogue) -> list[Cell]:
    """Group runs that differ only in their seed."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        data, remarks = data_of(run, catalogue), remarks_of(run, catalogue)
        groups.setdefault((data, remarks, *setting_of(run)), []).append(run)
    cells = []
    for (data, remarks, *_), group in groups.items():
        seeds = Counter((run.record.seed, run.record.checkpoint) for run in group)
        if max(seeds.values()) == 1:
            cells.append(Cell(tuple(group), data, remarks))
        else:  # something unrecorded differs, or it is the same run twice
            cells += [Cell((run,), data, (*remarks, "one seed more than once: not averaged")) for run in group]
    return cells


def data_of(run: Run, catalogue: Catalogue) -> str:
    """The data set's name if it is complete, else its folder's name."""
    whole = catalogue.datasets.get(run.task, catalogue.datasets["fine-tuning"])
    complete = run.record.train_images in whole.train_images and run.record.val_images == whole.val_images
    return whole.name if complete else Path(run.record.data or "data not recorded").name


def setting_of(run: Run) -> tuple:
    """Everything else recorded that a run's figure depends on, except the seed; changes are in its remarks."""
    names = ("stage", "train_images", "val_images", "pretrain_images")
    recorded = [getattr(run.record, name) for name in names] + [run.scales]
    weights = run.record.pretrain_epochs if run.identified else run.record.checkpoint
    return (run.method, run.backbone, run.task, run.metric, run.config, run.length, *recorded, weights)


def comparable(cell: Cell, figure: Published) -> bool:
    """Whether the two were measured in the same way; unknown values count as different."""
    run = cell.runs[0]
    ours = (run.method, run.backbone, run.record.pretrain_epochs, run.task, run.metric, run.scales)
    theirs = (figure.method, figure.backbone, figure.pretrain_epochs, figure.task, figure.metric, figure.scales)
    known = figure.status in ("read", "derived") and figure.value_to is None and None not in theirs
    return known and ours == theirs and not cell.remarks and run.recipe is not None and run.recipe.name == figure.recipe


@dataclass(frozen=True)
class Printed:
    """A table as text: rows by `HEADER`, and numbered lists of origins and notes below."""

    rows: list[list[str]]
    origins: dict[str, str]
    notes: list[str]


def print_form(table: Table) -> Printed:
    """Round all figures and turn them into text."""
    origins: dict[str, str] = {}  # text -> its mark
    rows = []
    for row in table.rows:
        labels, figure, cell = row.labels(), row.published, row.cell
        marks, remarks = [], list(cell.remarks) if cell else []
        if cell:
            text = "; ".join(f"{name} {value}" for name, value in cell.origin.items())
            marks.append(origins.setdefault(text, f"R{1 + sum(mark[0] == 'R' for mark in origins.values())}"))
        if figure:
            marks.append(origins.setdefault(figure.source, f"P{1 + sum(m[0] == 'P' for m in origins.values())}"))
            remarks += [f"note {1 + table.notes.index(note)}" for note in figure.notes]
        labels["Task"] += f", {labels.pop('Data')}"
        difference = "" if row.difference is None else f"{row.difference:+.2f}"
        words = [published_words(figure), our_words(cell), difference, "; ".join(remarks), ", ".join(marks)]
        rows.append([*labels.values(), *words])
    notes = [f"Note {number}: {note}" for number, note in enumerate(table.notes, 1)]
    marked = sorted(origins.items(), key=lambda item: (item[1][0], int(item[1][1:])))
    return Printed(rows, {mark: text for text, mark in marked}, [SPREAD, *notes])


def at_a_glance(table: Table) -> list[list[str]]:
    """Our cells again: one line per encoder, one column per metric; header and lines, empty for a single encoder.

    If several cells share a place, such as two lengths of a training, all are listed there.
    """
    lines: dict[tuple[str, ...], dict[str, list[str]]] = {}
    columns: list[str] = []
    for cell in {id(row.cell): row.cell for row in table.rows if row.cell}.values():
        labels = Row(None, cell).labels()
        column = f"{labels['Task']}, {labels['Data']}: {labels['Metric']}"
        changes = [it.removeprefix(PRETRAINING) for it in cell.runs[0].changes.split(", ") if PRETRAINING in it]
        encoder = (labels["Method"], labels["Backbone"], labels["Pretraining epochs"], ", ".join(changes))
        columns += [column] if column not in columns else []
        lines.setdefault(encoder, {}).setdefault(column, []).append(figure_words(cell))
    if len(lines) < 2:
        return []
    # Changes are shown if nothing else distinguishes two encoders.
    distinguishing = range(3 if len({encoder[:3] for encoder in lines}) == len(lines) else 4)
    several = [place for place in distinguishing if len({encoder[place] for encoder in lines}) > 1]
    header = [(*HEADER[:3], "Changed")[place] for place in several] + columns
    return [header] + [
        [encoder[place] for place in several] + ["; ".join(figures.get(column, [])) for column in columns]
        for encoder, figures in lines.items()
    ]


def figure_words(cell: Cell) -> str:
    """Mean and spread as text."""
    return f"{cell.mean:.2f}" + ("" if cell.spread is None else f" ± {cell.spread:.2f}")


def published_words(figure: Published | None) -> str:
    """A published figure as text, and how certain it is."""
    if figure is None or figure.value is None:
        return "" if figure is None else "unknown"
    return f"{figure.value}{f' to {figure.value_to}' if figure.value_to else ''}{MARKS[figure.status]}"


def our_words(cell: Cell | None) -> str:
    """Mean, spread and number of runs."""
    if cell is None:
        return ""
    return f"{figure_words(cell)} (n = {len(cell.runs)})"
