"""The results table: our runs beside the published figures.

Runs that differ by their seed alone are one cell: mean and sample standard deviation. A cell stands in the row of a
published figure, with the difference, only where method, backbone, pretraining, data, recipe and length are recorded
and the same. Every other cell has a row of its own, which says what keeps it from being compared.
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
SPREAD = "Ours: mean ± sample standard deviation over n runs that differ by their seed alone; percent."
PRETRAINING = "pretraining's "  #: before a changed option, in `Run.changes`
NOTHING = "nothing published to compare with"

#: Where a figure comes from: words of the table -> key of results.json.
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
    """Runs that differ by their seed alone, the data they were measured on, and what keeps them from comparison."""

    runs: tuple[Run, ...]
    data: str
    remarks: tuple[str, ...]

    @property
    def mean(self) -> float:
        """Of the runs."""
        return statistics.fmean(run.value for run in self.runs)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation; None of a single run."""
        if len(self.runs) == 1:
            return None
        values = [run.value for run in self.runs]
        return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan

    @property
    def origin(self) -> dict[str, str]:
        """Words of `ORIGIN`, and "folder" -> what the runs have there."""
        found = {name: joined(getattr(run.record, key) for run in self.runs) for name, key in ORIGIN.items()}
        if all("checkpoint" in run.record.given and not run.record.checkpoint for run in self.runs):
            found["checkpoint"] = "none"
        return found | {"folder": joined(run.folder for run in self.runs)}


@dataclass(frozen=True)
class Row:
    """A published figure, a cell of ours, or both where they may be compared."""

    published: Published | None
    cell: Cell | None

    @property
    def difference(self) -> float | None:
        """Ours less the published."""
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
        """The words of the row, by the columns of `HEADER` up to the recipe, and the data."""
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
    """Rows, and the warnings that belong to them."""

    rows: list[Row]
    notes: list[str]


def joined(values: Iterable) -> str:
    """Values in words, each once."""
    return ", ".join(dict.fromkeys("unknown" if value is None else str(value) for value in values))


def make_table(folders: Iterable[str | Path], catalogue: Catalogue, published: bool = True) -> Table:
    """All that is measured in the folders; beside it, the published figures of the same tasks."""
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
    """Put runs together that differ by their seed alone."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        data, remarks = data_of(run, catalogue), remarks_of(run, catalogue)
        groups.setdefault((data, remarks, *setting_of(run)), []).append(run)
    cells = []
    for (data, remarks, *_), group in groups.items():
        seeds = Counter((run.record.seed, run.record.checkpoint) for run in group)
        if max(seeds.values()) == 1:
            cells.append(Cell(tuple(group), data, remarks))
        else:  # something that is not recorded differs, or it is the same run twice
            cells += [Cell((run,), data, (*remarks, "one seed more than once: not averaged")) for run in group]
    return cells


def data_of(run: Run, catalogue: Catalogue) -> str:
    """The data set's name where it is whole, else that of its folder."""
    whole = catalogue.datasets.get(run.task, catalogue.datasets["fine-tuning"])
    complete = run.record.train_images in whole.train_images and run.record.val_images == whole.val_images
    return whole.name if complete else Path(run.record.data or "data not recorded").name


def setting_of(run: Run) -> tuple:
    """All else that a run's figure depends on, as far as it is recorded, but the seed; changes are in its remarks."""
    names = ("stage", "train_images", "val_images", "pretrain_images")
    recorded = [getattr(run.record, name) for name in names] + [run.scales]
    weights = run.record.pretrain_epochs if run.identified else run.record.checkpoint
    return (run.method, run.backbone, run.task, run.metric, run.config, run.length, *recorded, weights)


def comparable(cell: Cell, figure: Published) -> bool:
    """Whether the two were measured alike; what is not known is not alike."""
    run = cell.runs[0]
    ours = (run.method, run.backbone, run.record.pretrain_epochs, run.task, run.metric, run.scales)
    theirs = (figure.method, figure.backbone, figure.pretrain_epochs, figure.task, figure.metric, figure.scales)
    known = figure.status in ("read", "derived") and figure.value_to is None and None not in theirs
    return known and ours == theirs and not cell.remarks and run.recipe is not None and run.recipe.name == figure.recipe


@dataclass(frozen=True)
class Printed:
    """A table in words: rows by `HEADER`, and numbered lists of origins and notes below."""

    rows: list[list[str]]
    origins: dict[str, str]
    notes: list[str]


def print_form(table: Table) -> Printed:
    """Round and word all figures."""
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
    """Our cells once more: a line an encoder, a column a metric; header and lines, nothing of a single encoder.

    Two cells of one place, such as two lengths of a training, stand one after the other.
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
    # Changes are shown where nothing else distinguishes two encoders.
    distinguishing = range(3 if len({encoder[:3] for encoder in lines}) == len(lines) else 4)
    several = [place for place in distinguishing if len({encoder[place] for encoder in lines}) > 1]
    header = [(*HEADER[:3], "Changed")[place] for place in several] + columns
    return [header] + [
        [encoder[place] for place in several] + ["; ".join(figures.get(column, [])) for column in columns]
        for encoder, figures in lines.items()
    ]


def figure_words(cell: Cell) -> str:
    """Mean and spread."""
    return f"{cell.mean:.2f}" + ("" if cell.spread is None else f" ± {cell.spread:.2f}")


def published_words(figure: Published | None) -> str:
    """A published figure, and how sure it is."""
    if figure is None or figure.value is None:
        return "" if figure is None else "unknown"
    return f"{figure.value}{f' to {figure.value_to}' if figure.value_to else ''}{MARKS[figure.status]}"


def our_words(cell: Cell | None) -> str:
    """Mean, spread and number of runs."""
    if cell is None:
        return ""
    return f"{figure_words(cell)} (n = {len(cell.runs)})"
