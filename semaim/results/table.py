"""The results table: our runs next to published figures.

Runs that differ only in their seed form one cell: mean and sample standard deviation. A cell is in the row of a
published figure, with the difference, if nothing that is known of the two differs; the row says what the published
source does not state. Every other cell has its own row, which says why it is not compared. Gains between our own runs
are in `semaim.results.gains`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from semaim.errors import UserError
from semaim.registry import tasks as registered
from semaim.results import Catalogue, Published
from semaim.results.cells import Cell, figure_words, make_cells
from semaim.results.comparing import Comparison, compare, reason, unusable, way_words
from semaim.results.gains import Gain, Interval, encoder_of, gains_of, names_of
from semaim.results.runs import Run, find_results, read_runs
from semaim.results.skipping import Skipped

HEADER = (
    *("Method", "Backbone", "Pretraining epochs", "Task", "Metric", "Recipe", "Published", "Ours", "Difference"),
    *("Remark", "Origin"),
)
MARKS = {"read": "", "derived": " (derived)", "remembered": " (from memory)"}
SPREAD = "Ours: mean ± sample standard deviation over n runs that differ only in their seed; percent."
GAINS = (
    *("Method", "Baseline", "Task", "Metric", "Gain", "Verdict", "95 % over seeds", "95 % over images", "Seeds"),
    *("Published gain", "Backbone", "Recipe", "Remark"),
)
JUDGED = (
    "Gain: mean difference of runs with the same seed, in points. Over seeds: paired t. Over images: bootstrap over the"
    " validation images, paired unless it says otherwise. Better or worse: every interval excludes 0. Without an"
    " interval over seeds, or if all seeds are of one pretraining, this is about these weights, not about the method."
    " Each interval holds by itself: of twenty, one is expected to miss."
)
PRETRAINING = "pretraining's "  #: prefix of a changed option in `Run.changes`


@dataclass(frozen=True)
class Row:
    """A published figure, a cell of ours, or both if they may be compared; remarks on the figure, or on both."""

    published: Published | None
    cell: Cell | None
    more: tuple[str, ...] = ()

    @property
    def remarks(self) -> tuple[str, ...]:
        """Everything that a reader has to know about the row, besides the published figure's notes."""
        return (*(self.cell.remarks if self.cell else ()), *self.more)

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
    """Rows, their warnings, the gains of our runs over a baseline among them, and what was left out as it is broken."""

    rows: list[Row]
    notes: list[str]
    gains: list[Gain] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def make_table(
    folders: Iterable[str | Path], catalogue: Catalogue, published: bool = True, against: str | None = None
) -> Table:
    """Everything measured in the folders, and the published figures of the same tasks.

    Args:
        folders: searched for results.json, recursively.
        catalogue: what is published.
        published: whether its figures are rows, too.
        against: the method that gains are over; None for the usual one, see `semaim.results.gains.baseline_in`.
    """
    runs: list[Run] = []
    skipped = Skipped()
    for path in find_results(folders, skipped):
        with skipped.trying(path):
            runs += read_runs(path, catalogue)
    if not runs and skipped.lines:
        raise skipped.nothing("result")
    if not runs:
        raise UserError("the results found hold no figure that the table has, such as top1, mIoU or coco/bbox_mAP")
    cells = make_cells(runs, catalogue)
    figures = [f for f in catalogue.figures if published and any(f.task == run.task for run in runs)]
    rows = []
    for figure in figures:
        found = [(cell, comparison) for cell in cells if (comparison := beside(cell, figure)) and comparison.allowed]
        rows += [Row(figure, cell, not_stated(comparison)) for cell, comparison in found]
        rows += [] if found else [Row(figure, None, (way_words(figure, catalogue),))]
    alone = [cell for cell in cells if not any(cell is row.cell for row in rows)]
    whys = [(reason(cell.runs[0], figures),) if published and not cell.remarks else () for cell in alone]
    rows += [Row(None, cell, why) for cell, why in zip(alone, whys, strict=True)]
    measures = [(figure.task, figure.metric) for figure in figures] + [(run.task, run.metric) for run in runs]
    sections = list(dict.fromkeys(measures))
    tasks = by_pipeline(task for task, _ in sections)
    rows.sort(key=lambda row: (tasks.index(row.section[0]), sections.index(row.section)))
    notes = dict.fromkeys(note for figure in figures for note in figure.notes)
    sections.sort(key=lambda section: tasks.index(section[0]))
    cells.sort(key=lambda cell: sections.index((cell.runs[0].task, cell.runs[0].metric)))
    return Table(rows, list(notes), gains_of(cells, against, catalogue), skipped.lines)


def by_pipeline(titles: Iterable[str]) -> list[str]:
    """Distinct titles of tasks, in the order of the pipeline; of tasks that are not known, last."""
    known = [task.title for task in registered()]
    return sorted(dict.fromkeys(titles), key=lambda title: known.index(title) if title in known else len(known))


def beside(cell: Cell, figure: Published) -> Comparison | None:
    """How a cell compares with a figure; None if that says nothing: other measures, no value, remarks on the cell."""
    run = cell.runs[0]
    alike = (run.task, run.metric) == (figure.task, figure.metric) and not cell.remarks and not unusable(figure)
    return compare(run, figure) if alike else None


def not_stated(comparison: Comparison) -> tuple[str, ...]:
    """The remark on what a published source does not state."""
    return (f"the source does not state: {', '.join(comparison.unstated)}",) if comparison.unstated else ()


@dataclass(frozen=True)
class Printed:
    """A table as text: rows by `HEADER`, numbered lists of origins and notes, and gains: their header, then rows."""

    rows: list[list[str]]
    origins: dict[str, str]
    notes: list[str]
    gains: list[list[str]]


def print_form(table: Table) -> Printed:
    """Round all figures and turn them into text."""
    origins: dict[str, str] = {}  # text -> its mark
    rows = []
    for row in table.rows:
        labels, figure, cell = row.labels(), row.published, row.cell
        marks, remarks = [], list(row.remarks)
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
    gains = [list(GAINS), *gain_rows(table)] if table.gains else []
    return Printed(rows, {mark: text for text, mark in marked}, [SPREAD, *([JUDGED] if gains else []), *notes], gains)


def gain_rows(table: Table) -> list[list[str]]:
    """The gains as text, by the columns of `GAINS`."""
    named = encoder_names(table)
    rows = []
    for gain in table.gains:
        place, ours, baseline = gain.place, encoder_of(gain.ours.runs[0]), encoder_of(gain.baseline.runs[0])
        published = f"{gain.published.value:+g}" if gain.published and gain.published.value is not None else ""
        what = [named[ours], named[baseline], f"{place.task}, {place.data}", place.metric]
        intervals = [interval_words(gain.over_seeds), interval_words(gain.over_images)]
        judged = [f"{gain.points:+.2f}", gain.verdict, *intervals, str(gain.seeds), published]
        rows.append([*what, *judged, place.backbone or "not recorded", place.recipe, "; ".join(gain.remarks)])
    return rows


def encoder_names(table: Table) -> dict:
    """Encoders of the gains -> names that distinguish them."""
    cells = [cell for gain in table.gains for cell in (gain.ours, gain.baseline)]
    encoders = list(dict.fromkeys(encoder_of(cell.runs[0]) for cell in cells))
    return dict(zip(encoders, names_of(encoders), strict=True))


def interval_words(interval: Interval | None) -> str:
    """Ends of an interval, and what it is over."""
    return f"{interval.low:+.2f} to {interval.high:+.2f} ({interval.over})" if interval else ""


def gains_at_a_glance(table: Table) -> list[list[str]]:
    """The gains again: one line per encoder, one column per metric, with the verdict; empty if there are none."""
    named, headings = encoder_names(table), columns_of(map(glance_place, table.gains))
    lines: dict[str, dict[str, list[str]]] = {}
    columns: dict[str, None] = {}
    for gain in table.gains:
        column, baseline = headings[glance_place(gain)], named[encoder_of(gain.baseline.runs[0])]
        name = f"{named[encoder_of(gain.ours.runs[0])]} over {baseline}"
        columns[column] = None
        ends = [(interval.low, interval.high) for interval in gain.intervals]
        wide = f" [{min(e[0] for e in ends):+.2f}, {max(e[1] for e in ends):+.2f}]" if ends else ""
        lines.setdefault(name, {}).setdefault(column, []).append(f"{gain.points:+.2f}{wide}: {gain.verdict}")
    if not lines:
        return []
    return [["Gain", *columns]] + [
        [name, *("; ".join(figures.get(column, [])) for column in columns)] for name, figures in lines.items()
    ]


def glance_place(gain: Gain) -> tuple[str, ...]:
    """A gain's place for `columns_of`."""
    place = gain.place
    return place.task, place.data, place.metric, place.backbone or "not recorded", place.recipe


def columns_of(places: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Each place -> its heading: task, data and metric, and of the rest what differs between places alike in these."""
    alike: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for place in dict.fromkeys(places):
        alike.setdefault(place[:3], []).append(place[3:])
    headings = {}
    for what, rests in alike.items():
        task, data, metric = what
        apart = [len(set(values)) > 1 for values in zip(*rests, strict=True)]
        for rest in rests:
            more = ", ".join(value for value, differs in zip(rest, apart, strict=True) if differs)
            headings[what + rest] = f"{task}, {data}: {metric}" + (f" ({more})" if more else "")
    return headings


def at_a_glance(table: Table) -> list[list[str]]:
    """Our cells again: one line per encoder, one column per metric; header and lines, empty for a single encoder.

    If several cells share a place, such as two lengths of a training, all are listed there.
    """
    lines: dict[tuple[str, ...], dict[str, list[str]]] = {}
    columns: list[str] = []
    cells = {id(row.cell): row.cell for row in table.rows if row.cell}.values()
    places = [tuple(Row(None, cell).labels()[it] for it in ("Task", "Data", "Metric", "Recipe")) for cell in cells]
    headings = columns_of(places)
    for cell, place in zip(cells, places, strict=True):
        labels, column = Row(None, cell).labels(), headings[place]
        changes = [it.removeprefix(PRETRAINING) for it in cell.runs[0].changed if it.startswith(PRETRAINING)]
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
