"""The start of a report: pretrained encoders against random weights, and which differences are significant."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from semaim.errors import UserError
from semaim.reading import read_json
from semaim.registry import task_titled, tasks
from semaim.results import Catalogue
from semaim.results.cells import AGAIN, Cell, make_cells
from semaim.results.difference import difference
from semaim.results.gains import RANDOM, Encoder, Gain, Place, encoder_of, measure, names_of, place_of
from semaim.results.runs import Run, read_runs

#: Pictures of a pretraining; the first existing one is shown.
LOOKS = {
    "orders.png": "validation images, in which order it predicts their patches (bright first), and what it predicts",
    "reconstruction.png": "validation images, and what it predicts of them",
}


@dataclass(frozen=True)
class Judged:
    """A difference in words; side: 1 above 0, -1 below, 0 cannot tell, None if there is no interval.

    `varied`: see `Gain.varied`.
    """

    words: str = ""
    side: int | None = None
    varied: bool = False


@dataclass(frozen=True)
class Line:
    """A measure: short and full name, validation images, figures by encoder, differences by pretrained encoder."""

    name: str
    measure: str
    images: str
    figures: list[str]
    differences: list[Judged]


@dataclass(frozen=True)
class Opening:
    """The whole opening: encoders (random weights last), lines, sentences, and pictures as (caption, file)."""

    encoders: list[str]
    lines: list[Line]
    verdicts: list[str]
    centres: list[str]
    pictures: list[tuple[str, Path]]

    @property
    def headings(self) -> list[str]:
        """Headings of the differences."""
        pretrained = self.encoders[:-1]
        return ["Difference"] if len(pretrained) == 1 else [f"Difference of {name}" for name in pretrained]


def make_opening(files: Iterable[Path], catalogue: Catalogue) -> Opening | None:
    """The opening for these results.json; None if no measure has both a pretrained encoder and random weights."""
    runs = [run for file in files for run in headline_runs(file, catalogue)]
    places: dict[Place, dict[Encoder, list[Cell]]] = {}
    for cell in make_cells(runs, catalogue):
        place = place_of(cell.runs[0], catalogue)
        places.setdefault(place, {}).setdefault(encoder_of(cell.runs[0]), []).append(cell)
    random = Encoder(RANDOM)
    places = {place: cells for place, cells in places.items() if random in cells and len(cells) > 1}
    if not places:
        return None
    encoders = [it for it in dict.fromkeys(it for cells in places.values() for it in cells) if it != random]
    names = [*names_of(encoders), RANDOM]
    order = sorted(places, key=lambda place: named_measure(place)[0])
    lines = []
    for place in order:
        cells = places[place]
        figures = ["; ".join(map(seeds_words, cells.get(it, []))) for it in (*encoders, random)]
        judged = [judge(cells.get(it, []), cells[random], place, catalogue) for it in encoders]
        lines.append(Line(*words_of(place, order), str(place.val_images or "not recorded"), figures, judged))
    cells_of = {it: [cell for place in order for cell in places[place].get(it, [])] for it in encoders}
    return Opening(
        names,
        lines,
        [words for number, name in enumerate(names[:-1]) if (words := verdict(name, number, lines))],
        [line for it, name in zip(encoders, names, strict=False) for line in centres_of(name, cells_of[it])],
        [shown for it, name in zip(encoders, names, strict=False) for shown in pictures_of(name, cells_of[it])],
    )


# What is compared


def headline_runs(file: Path, catalogue: Catalogue) -> list[Run]:
    """The measures of a results.json that have a short name; for k-NN the usual k, else the smallest."""
    found = read_runs(file, catalogue)
    for run in found[:1]:
        task = task_titled(run.task)
        for name, metric in (task.metrics if task else {}).items():
            value = run.record.metrics.get(name)
            if value is not None and metric.short and not metric.tabled and metric.measured(value):
                found.append(replace(run, metric=metric.label, value=metric.factor * float(value)))
    first: dict[str, Run] = {}  # the first of each short name: numbers of neighbours are by rising k
    for run in found:
        if measure := measure_of(run.task, run.metric):
            first.setdefault(measure[1], run)
    return list(first.values())


def measure_of(title: str, label: str) -> tuple[int, str] | None:
    """Position among all measures, and short name, of a task's metric, by the start of its label; None without one."""
    wanted, place = label.partition(",")[0], 0
    for task in tasks():
        for metric in task.metrics.values():
            place += 1
            if metric.short and (task.title, metric.label.partition(",")[0]) == (title, wanted):
                return place, metric.short
    return (place + 1, "classification") if (title, wanted) == ("classification", "top-1") else None


def named_measure(place: Place) -> tuple[int, str]:
    """`measure_of` for a place, which always has one."""
    return measure_of(place.task, place.metric) or (0, place.metric)


def words_of(place: Place, all_places: Iterable[Place]) -> tuple[str, str]:
    """The measure's short and full name, with data, backbone and config if another line has the same measure."""
    name = named_measure(place)[1]
    more = place.metric.partition(", ")[2] or ("top-1" if place.metric == "top-1" else "")
    where = ""
    if sum(other[:2] == place[:2] for other in all_places) > 1:
        where = f" ({', '.join(part for part in (place.data, place.backbone, place.recipe) if part)})"
    return f"{name}{where}", f"{name}{f', {more}' if more else ''}{where}"


def seeds_words(cell: Cell) -> str:
    """Mean and spread, to a tenth of a point."""
    count = len(cell.runs)
    return f"{cell.mean:.1f}" if count == 1 else f"{cell.mean:.1f} ± {cell.spread:.1f} ({count} seeds)"


# Significance


def judge(ours: list[Cell], random: list[Cell], place: Place, catalogue: Catalogue) -> Judged:
    """Pretrained minus random weights, in words; empty if one is missing."""
    if not ours:
        return Judged()
    if any(AGAIN in cell.remarks for cell in (*ours, *random)) or len(ours) > 1 or len(random) > 1:
        return Judged("not averaged: one seed more than once")
    found = measure(ours[0], random[0], place, catalogue)
    return Judged(gain_words(found), found.side, found.varied)


def gain_words(gain: Gain) -> str:
    """A gain, its intervals, and whether they exclude 0."""
    if not gain.intervals:
        return f"{gain.points:+.1f} (no interval)"
    intervals = [f"{it.low:+.1f} to {it.high:+.1f} over {it.over}" for it in gain.intervals]
    return f"{gain.points:+.1f} (95 %: {'; '.join(intervals)})" + ("" if gain.side else ": cannot tell")


def verdict(name: str, place: int, lines: list[Line]) -> str:
    """A sentence about an encoder, by the intervals that there are."""
    found: dict[str, list[str]] = {}
    for side, text in {1: f"above {RANDOM} in", -1: f"below {RANDOM} in", 0: "cannot tell in"}.items():
        for line in lines:
            judged = line.differences[place]
            if judged.side == side:
                weights = "" if judged.varied or not side else " (for these weights)"
                found.setdefault(f"{text} {{}}{weights}", []).append(line.name)
    parts = [text.format(listed(names)) for text, names in found.items()]
    return f"{name}, by the 95 % intervals: {'; '.join(parts)}." if parts else ""


def listed(names: list[str]) -> str:
    """A, B and C."""
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


# The encoder's pretraining


def pretrainings_of(cells: list[Cell]) -> dict[Path, float | None]:
    """Existing folders of the pretrainings that the runs started from -> seed, if known."""
    found: dict[Path, float | None] = {}
    for run in (run for cell in cells for run in cell.runs):
        named = Path(run.record.checkpoint or "").parent
        beside = Path(run.folder).resolve().parent / named.name  # if all runs were moved together
        if os.path.isdir(beside) and beside.parts[-3:] == named.parts[-3:]:
            found.setdefault(beside, run.record.seed)
        elif os.path.isdir(named) and named.name:
            found.setdefault(named.resolve(), run.record.seed)
    return found


def centres_of(name: str, cells: list[Cell]) -> list[str]:
    """One sentence per pretraining on where its centre falls, from the file that `semaim.benchmarks.centres` wrote."""
    found = [(folder / "centres.json", seed) for folder, seed in pretrainings_of(cells).items()]
    found = [(file, seed) for file, seed in found if file.is_file()]
    lines = []
    for file, seed in found:
        try:
            rows = read_json(file)["rows"]
            (row, *_) = [row for row in rows if row["used"] and row["checkpoint"]]
            on, chance, fixed = (100 * float(row[key]) for key in ("on_object", "chance", "best_fixed"))
            judged = difference(on, int(row["images"]), fixed, int(row["images"]))
        except (OSError, ArithmeticError, LookupError, ValueError, TypeError, UserError):  # skip what is broken
            continue
        sure = {1: "", 0: "; cannot tell it from that place", -1: "; that place does better"}[judged.side]
        whose = f"{name}, seed {seed}" if len(found) > 1 else name
        lines.append(
            f"{whose}: the centre lies on an object in {on:.0f} % of {row['images']} validation scenes (chance"
            f" {chance:.0f} %, best fixed place {fixed:.0f} %{sure})."
        )
    return lines


def pictures_of(name: str, cells: list[Cell]) -> list[tuple[str, Path]]:
    """Pictures of the first pretraining, detector and segmentor of an encoder that have one: (caption, file)."""
    looks = [(words, folder / look) for folder in pretrainings_of(cells) for look, words in LOOKS.items()]
    found = [(f"{name}: {words}", file) for words, file in looks if file.is_file()][:1]
    for task in (task for task in tasks() if task.shows):
        folders = [Path(run.folder) for cell in cells for run in cell.runs if run.task == task.title]
        files = [folder / "predictions.png" for folder in folders if (folder / "predictions.png").is_file()]
        found += [(f"{name}: {task.shows}", file) for file in files[:1]]
    return found
