"""One self-contained HTML file about runs: table, curves, pictures, per-class figures, times and configs."""

import base64
import datetime
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image, ImageOps

from semaim import __version__
from semaim.drawing.curves import Chart, charts_of
from semaim.errors import UserError, writing
from semaim.record import Record, read_record
from semaim.registry import charted, tasks
from semaim.results import Catalogue, load_published
from semaim.results.attribution import CREDIT, SOURCES, shows_scenes
from semaim.results.logs import read_lines
from semaim.results.opening import make_opening
from semaim.results.runs import read_runs
from semaim.results.table import HEADER, Table, at_a_glance, make_table, print_form

MARKS = ("results.json", "vis_data/scalars.json", "vis_data/config.py")  #: files that mark the folder of a run
WIDEST = 1000  #: largest width of a picture in the report, in pixels
MOST = 6  #: largest number of pictures of one kind and run, except of orders
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
STAMP = re.compile(r"^(\d{4}/\d\d/\d\d \d\d:\d\d:\d\d) - ")  #: at the start of mmengine's log lines
TASK = re.compile(r"^task = ['\"](\w+)['\"]$", re.MULTILINE)  #: in a config as written to the work folder


@dataclass(frozen=True)
class Picture:
    """A picture as a data URI."""

    name: str
    source: str
    width: int
    height: int


@dataclass
class ClassTable:
    """Per-class figures: header and rows, as logged."""

    title: str
    head: list[str]
    rows: list[list[str]]


@dataclass
class RunPart:
    """Everything that a report shows of one run; empty where not recorded."""

    name: str
    stage: str = ""
    figures: dict[str, str] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    measured: dict[str, str] = field(default_factory=dict)
    charts: list[Chart] = field(default_factory=list)
    pictures: dict[str, list[Picture]] = field(default_factory=dict)
    classes: list[ClassTable] = field(default_factory=list)
    configs: dict[str, str] = field(default_factory=dict)


def write_report(folders: Sequence[Path], out: Path, lead: str | None = None) -> None:
    """Write a self-contained HTML file about all runs in the folders, searched recursively.

    Args:
        folders: of runs, or folders of them.
        out: the file.
        lead: first sentences: what the runs are and what they can show.
    """
    runs, catalogue = find_runs(folders), load_published()
    parts = [read_part(folder, name, catalogue) for folder, name in runs.items()]
    loader = PackageLoader("semaim", "results")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    table = table_of(runs, catalogue)
    opening = make_opening([folder / "results.json" for folder in measured(runs)], catalogue)
    shown = [(words, encode(path)) for words, path in opening.pictures] if opening else []
    pictured = [folder for folder, part in zip(runs, parts, strict=True) if part.pictures]
    pictured += [path.parent for _, path in opening.pictures] if opening else []
    page = environment.get_template("report.html").render(
        lead=lead,
        opening=opening,
        shown=[(words, picture) for words, picture in shown if picture],
        runs=parts,
        glance=at_a_glance(table) if table else [],
        table=print_form(table) if table else None,
        recorded={name for part in parts for name in part.facts},
        header=HEADER,
        credit=f"{CREDIT} ({SOURCES})." if any(map(shows_scenes, pictured)) else "",
        date=f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        version=__version__,
    )
    with writing(out):
        out.write_text(page, encoding="utf-8")


# Finding


def find_runs(folders: Iterable[Path]) -> dict[Path, str]:
    """Folders of runs -> their names, which are their paths relative to the given folder."""
    found: dict[Path, str] = {}
    for given in map(Path, folders):
        if not given.is_dir():
            raise UserError(f"no such folder: {given}")
        root = given.resolve()
        files = [path for mark in MARKS for path in root.rglob(mark)]
        inside = {path.parent if path.name == "results.json" else path.parents[2] for path in files}
        inside = {path for path in inside if path.is_relative_to(root)}  # if a folder inside a run was given
        if not inside:
            raise UserError(f"no run in {given}: a run's folder holds results.json, or logged scalars and config")
        for folder in sorted(inside):
            found.setdefault(folder, "/".join((root.name, *folder.relative_to(root).parts)))
    names = list(found.values())
    return {folder: name if names.count(name) == 1 else str(folder) for folder, name in found.items()}


def measured(runs: Iterable[Path]) -> list[Path]:
    """The folders that contain results.json."""
    return [folder for folder in runs if (folder / "results.json").is_file()]


def table_of(runs: Iterable[Path], catalogue: Catalogue) -> Table | None:
    """The results table of these folders; None if they have no figure that it shows."""
    tabled = [folder for folder in measured(runs) if read_runs(folder / "results.json", catalogue)]
    return make_table(tabled, catalogue) if tabled else None


# Reading one run


def read_part(folder: Path, name: str, catalogue: Catalogue) -> RunPart:
    """The contents of a run's folder."""
    part = RunPart(name, configs=configs_of(folder), pictures=pictures_of(folder))
    lines, results = read_lines(folder), folder / "results.json"
    record = read_record(results) if results.is_file() else Record({})
    logs = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*/*.log"))]
    named = [name for text in part.configs.values() for name in TASK.findall(text)]
    titles = [task.title for task in tasks() if task.name in named]
    measured = [run.task for run in read_runs(results, catalogue)] if record.metrics else []
    part.stage = next((str(stage) for stage in (record.task, *titles, *measured, record.stage) if stage), "")
    part.charts = charts_of(lines, charted())
    part.facts = facts_of(lines, logs, record)
    part.measured = {key: worded(value) for key, value in record.metrics.items()}
    part.figures = {key: value for key, value in part.measured.items() if is_headline(key)} or part.measured
    part.classes = classes_of(logs)
    part.facts |= {
        key.replace("_", " "): worded(value)
        for key, value in record.values().items()
        if key != "reported" and value not in (None, {}, "")
    }
    return part


def is_headline(key: str) -> bool:
    """Whether a measured value is preferred in the list of runs."""
    found = [task.metrics[key] for task in tasks() if key in task.metrics]
    return any(metric.short and metric.tabled for metric in found)


def worded(value: object) -> str:
    """A value of results.json as text."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else value if isinstance(value, str) else json.dumps(value)


def configs_of(folder: Path) -> dict[str, str]:
    """File name -> text of the run's configs: as given, or else the newest in its log folders."""
    files = sorted(folder.glob("*.py")) or sorted(folder.glob("*/vis_data/config.py"))[-1:]
    return {path.name: path.read_text(encoding="utf-8", errors="replace") for path in files}


def facts_of(lines: Sequence[dict], logs: Sequence[str], record: Record) -> dict[str, str]:
    """Length, time, speed and memory, as far as logged."""
    facts = {}
    training = [line for line in lines if "validation" not in line]
    if training:
        facts["logged up to"] = f"iteration {training[-1]['iter']:,}"
        if "epoch" in training[-1]:
            facts["logged up to"] += f", epoch {training[-1]['epoch']:,}"
    spans = [stamps[-1] - stamps[0] for stamps in map(stamps_of, logs) if stamps]
    if spans:
        facts["time"] = str(sum(spans, datetime.timedelta()))
    for key, words, form in (("images_per_second", "images/s", "{:.1f}"), ("memory", "memory", "{:,.0f} MB")):
        values = sorted(line[key] for line in training if isinstance(line.get(key), int | float))
        if values:
            facts[words] = form.format(values[len(values) // 2] if key != "memory" else values[-1])
    device = re.findall(r"INFO - torch \S+ on (.+); seed ", "\n".join(logs))
    if device and record.device is None:
        facts["device"] = device[-1]
    return facts


def stamps_of(log: str) -> list[datetime.datetime]:
    """The timestamps of a log's lines."""
    found = [match[1] for match in map(STAMP.match, log.splitlines()) if match]
    return [datetime.datetime.strptime(stamp, "%Y/%m/%d %H:%M:%S") for stamp in (found[:1] + found[-1:])]


def classes_of(logs: Sequence[str]) -> list[ClassTable]:
    """The last per-class table of each kind that mmdet (with `classwise`) and mmseg log."""
    found: dict[str, ClassTable] = {}
    for log in logs:
        evaluated, head, rows = "", None, []
        for line in [*log.splitlines(), ""]:
            if line.startswith(("|", "+-")):
                cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
                if line.startswith("|") and head is None:
                    head = cells
                elif line.startswith("|"):
                    rows.append(cells)
            elif head is not None:
                if head[0].lower() in ("class", "category") and len(head) > 2:
                    kind = {"bbox": "box AP", "segm": "mask AP"}.get(evaluated, ", ".join(head[1:]))
                    found[kind] = ClassTable(f"{kind} of each class", ["class", *head[1:]], rows)
                head, rows = None, []
            if match := re.search(r"Evaluating (\w+)\.\.\.", line):
                evaluated = match[1]
    return list(found.values())


# Pictures


def pictures_of(folder: Path) -> dict[str, list[Picture]]:
    """Caption -> pictures of a run: its orders during training, predictions, and those in the folder itself."""
    predicted = [path.parent for path in folder.glob("*/predictions.json")]
    chosen = {"Orders over training": spread(listed(folder / "orders"), 3)}  # first, middle, last
    for place in sorted({*predicted, folder / "predictions"}):
        words = "Predictions" if place.name == "predictions" else f"Predictions ({place.name})"
        chosen[words] = spread(listed(place), MOST)
    chosen["Pictures"] = spread(listed(folder), MOST)
    shown = {words: [shown for path in paths if (shown := encode(path))] for words, paths in chosen.items()}
    return {words: pictures for words, pictures in shown.items() if pictures}


def listed(folder: Path) -> list[Path]:
    """Picture files of a folder; numbers in names are sorted by value."""
    files = [path for path in folder.glob("*") if path.suffix.lower() in ENDINGS and not path.name.startswith(".")]
    return sorted(files, key=lambda path: [(part.zfill(12), part) for part in re.findall(r"\d+|\D+", path.name)])


def spread(items: Sequence, most: int) -> list:
    """At most `most` of the items, evenly spaced from the first to the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def encode(path: Path) -> Picture | None:
    """A picture, at most `WIDEST` pixels wide, as the smaller of PNG and JPEG; None if it cannot be read."""
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGBA")
    except Exception:  # Pillow raises many types; a training may be writing it
        return None
    ground = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(ground, image).convert("RGB")
    if image.width > WIDEST:
        image = image.resize((WIDEST, max(1, round(image.height * WIDEST / image.width))), Image.Resampling.LANCZOS)
    coded = []
    for kind, options in (("PNG", {"optimize": True}), ("JPEG", {"quality": 85})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        coded.append((buffer.tell(), kind.lower(), buffer.getvalue()))
    _, kind, data = min(coded)
    return Picture(path.stem, f"data:image/{kind};base64,{base64.b64encode(data).decode()}", *image.size)
