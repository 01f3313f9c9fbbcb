"""One self-contained HTML file about runs: the results table; for each stage curves, pictures, figures and configs."""

import datetime
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from semaim import __version__
from semaim.errors import UserError, writing
from semaim.results import Catalogue, load_published
from semaim.results.attribution import CREDIT, SOURCES, shows_scenes
from semaim.results.figures import NOTHING
from semaim.results.opening import make_opening
from semaim.results.overlays import Overlay, overlays_of
from semaim.results.parts import RunPart, in_order, read_part
from semaim.results.pictures import encode
from semaim.results.runs import read_runs
from semaim.results.skipping import Skipped, files_in
from semaim.results.table import HEADER, JUDGED, Printed, Table, at_a_glance, make_table, print_form

MARKS = ("results.json", "vis_data/scalars.json", "vis_data/config.py")  #: files that mark the folder of a run
#: Facts that are columns of a stage's list of runs.
LISTED = ("logged up to", "time", "images/s", "memory", "device")


@dataclass(frozen=True)
class StagePart:
    """A stage of the pipeline: its runs and their charts."""

    title: str
    anchor: str
    runs: list[RunPart]
    charts: list[Overlay]

    @property
    def name(self) -> str:
        """The title as a heading."""
        return capital(self.title)

    @property
    def measures(self) -> list[str]:
        """Headings of the figures in its list of runs."""
        return list(dict.fromkeys(heading for run in self.runs for heading in run.headlines))

    @property
    def listed(self) -> list[str]:
        """Those of `LISTED` that some run has."""
        return [name for name in LISTED if any(name in run.facts for run in self.runs)]


@dataclass(frozen=True)
class Results:
    """The results table for the page: our rows, all rows, and what is said below each; `names` are the columns."""

    names: tuple[str, ...]
    glance: list[list[str]]
    gains: list[list[str]]
    gain_notes: list[str]
    ours: list[list[str]]
    rows: list[list[str]]
    notes: list[str]
    more_notes: list[str]
    origins: dict[str, str]
    more_origins: dict[str, str]

    @property
    def figures(self) -> list[str]:
        """The columns of the glance that have figures; the others describe the encoder."""
        return [name for name in self.glance[0] if ": " in name]


def write_report(folders: Sequence[Path], out: Path, lead: str | None = None) -> list[str]:
    """Write a self-contained HTML file about all runs in the folders, searched recursively.

    Returns what was left out, as it cannot be read; `UserError` if nothing is left.

    Args:
        folders: of runs, or folders of them.
        out: the file.
        lead: first sentences: what the runs are and what they can show.
    """
    skipped, catalogue = Skipped(), load_published()
    runs: dict[Path, RunPart] = {}
    for folder, name in find_runs(folders, skipped).items():
        with skipped.trying(folder):
            runs[folder] = read_part(folder, name, catalogue, skipped)
    if not runs:
        raise skipped.nothing("run")
    pictured = [folder for folder, part in runs.items() if part.pictures]
    table = table_of(runs, catalogue)
    opening = make_opening([folder / "results.json" for folder in measured(runs)], catalogue)
    shown = [(words, encode(path, skipped)) for words, path in opening.pictures] if opening else []
    pictured += [path.parent for _, path in opening.pictures] if opening else []
    loader = PackageLoader("semaim", "results")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html").render(
        lead=lead,
        nothing=NOTHING,
        opening=opening,
        shown=[(words, picture) for words, picture in shown if picture],
        stages=stages_of(runs.values()),
        count=len(runs),
        skipped=skipped.lines,
        results=results_of(table) if table else None,
        credit=f"{CREDIT} ({SOURCES})." if any(map(shows_scenes, pictured)) else "",
        date=f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        version=__version__,
    )
    with writing(out):
        out.write_text(page, encoding="utf-8")
    return skipped.lines


def stages_of(parts: Iterable[RunPart]) -> list[StagePart]:
    """The stages of these runs in the order of the pipeline; gives every run its anchor."""
    found: list[StagePart] = []
    places: dict[str, int] = {}  # of the series of all charts
    for title, runs in in_order(parts).items():
        anchor = f"stage{len(found) + 1}"
        for number, run in enumerate(runs, 1):
            run.anchor = f"{anchor}-run{number}"
        found.append(StagePart(title, anchor, runs, overlays_of(runs, anchor, places)))
    return found


def capital(title: str) -> str:
    """A title with a capital, unless its first word has one: "pretraining" -> "Pretraining", "k-NN" as it is."""
    return title[:1].upper() + title[1:] if title.partition(" ")[0].islower() else title


# Finding


def find_runs(folders: Iterable[Path], skipped: Skipped | None = None) -> dict[Path, str]:
    """Folders of runs -> their names, which are their paths relative to the given folder."""
    found: dict[Path, str] = {}
    for given in map(Path, folders):
        if not given.is_dir():
            raise UserError(f"no such folder: {given}")
        root = given.resolve()
        files = [path for path in files_in(root, skipped or Skipped()) if any(map(path.match, MARKS))]
        inside = {path.parent if path.name == "results.json" else path.parents[2] for path in files}
        inside = {path for path in inside if path.is_relative_to(root)}  # if a folder inside a run was given
        if not inside:
            raise UserError(f"no run in {given}: a work folder holds results.json, or logged scalars and config")
        for folder in sorted(inside):
            found.setdefault(folder, "/".join((root.name, *folder.relative_to(root).parts)))
    names = list(found.values())
    return {folder: name if names.count(name) == 1 else str(folder) for folder, name in found.items()}


def measured(runs: Iterable[Path]) -> list[Path]:
    """The folders that contain results.json."""
    return [folder for folder in runs if os.path.lexists(folder / "results.json")]


# The results table


def table_of(runs: Iterable[Path], catalogue: Catalogue) -> Table | None:
    """The results table of these folders; None if they have no figure that it shows."""
    tabled = [folder for folder in measured(runs) if read_runs(folder / "results.json", catalogue)]
    return make_table(tabled, catalogue) if tabled else None


def results_of(table: Table) -> Results:
    """The table as the page shows it: notes and origins are divided by whether one of our rows names them."""
    printed: Printed = print_form(table)
    ours = [row for row in printed.rows if row[HEADER.index("Ours")]]
    named = {mark for row in ours for mark in row[HEADER.index("Origin")].split(", ")}
    remarks = " ".join(row[HEADER.index("Remark")] for row in ours)
    numbers = set(re.findall(r"\bnote (\d+)\b", remarks))

    def for_ours(note: str) -> bool:
        number = re.match(r"Note (\d+): ", note)
        return number[1] in numbers if number else note != JUDGED

    return Results(
        HEADER,
        at_a_glance(table),
        printed.gains,
        [note for note in printed.notes if note == JUDGED],
        ours,
        printed.rows,
        [note for note in printed.notes if for_ours(note)],
        [note for note in printed.notes if note != JUDGED and not for_ours(note)],
        {mark: text for mark, text in printed.origins.items() if mark in named},
        {mark: text for mark, text in printed.origins.items() if mark not in named},
    )
