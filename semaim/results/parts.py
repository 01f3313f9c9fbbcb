"""What a report shows of one run, read from its work folder."""

import datetime
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from semaim.reading import read_text
from semaim.record import Record, read_record, record_of
from semaim.registry import Metric, Task, method_of, task_named, task_titled, tasks
from semaim.results import Catalogue
from semaim.results.config_text import read_config
from semaim.results.figures import ClassTable, Figure, classes_of, figures_of, recorded_classes, worded
from semaim.results.logs import read_lines
from semaim.results.opening import LOOKS
from semaim.results.pictures import Picture, pictures_of
from semaim.results.runs import Run, read_runs
from semaim.results.runs import method_of as method_in
from semaim.results.skipping import Skipped

STAMP = re.compile(r"^(\d{4}/\d\d/\d\d \d\d:\d\d:\d\d) - ")  #: at the start of mmengine's log lines


@dataclass
class RunPart:
    """Everything that a report shows of one run; empty where not recorded.

    Attributes:
        name: of its folder.
        stage: title of its task; else what results.json says was done.
        task: None if the run does not say, or it is not known here.
        setting: method, length of the pretraining, changes, config and data: runs that have all in common are seeds.
        lines: as logged, see `semaim.results.logs.read_lines`.
    """

    name: str
    stage: str = ""
    task: Task | None = None
    setting: tuple[str, ...] = ()
    seed: str = ""
    figures: list[Figure] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    recorded: dict[str, str] = field(default_factory=dict)
    lines: list[dict] = field(default_factory=list)
    pictures: dict[str, list[Picture]] = field(default_factory=dict)
    classes: list[ClassTable] = field(default_factory=list)
    configs: dict[str, str] = field(default_factory=dict)
    anchor: str = ""

    @property
    def method(self) -> str:
        """The method whose encoder it is."""
        return self.setting[0] if self.setting else ""

    @property
    def captions(self) -> dict[str, str]:
        """Name of a picture -> what it shows."""
        shown = self.task.shows if self.task else ""
        return {Path(name).stem: words for name, words in LOOKS.items()} | ({"predictions": shown} if shown else {})

    @property
    def headlines(self) -> dict[str, str]:
        """Heading -> figure, of those that a list of runs shows."""
        return {it.heading: it.text for it in self.figures if it.headline}


def read_part(folder: Path, name: str, catalogue: Catalogue, skipped: Skipped | None = None) -> RunPart:
    """The contents of a run's folder; `skipped` takes which of its files were left out.

    Raises:
        UserError: its results.json is broken: then nothing is known of the run.
    """
    skipped = skipped or Skipped()
    configs = texts_of(sorted(folder.glob("*.py")) or sorted(folder.glob("*/vis_data/config.py"))[-1:], skipped)
    # The newest in the log folders has all values.
    logged = "".join(texts_of(sorted(folder.glob("*/vis_data/config.py"))[-1:], skipped).values())
    results = folder / "results.json"
    cfg = read_config(logged)
    for text in () if cfg else configs.values():
        cfg = cfg or read_config(text)
    there = os.path.lexists(results)
    record = read_record(results) if there else record_in(cfg)
    runs = read_runs(results, catalogue) if record.metrics else []
    logs = list(texts_of(sorted(folder.glob("*/*.log")), skipped).values())
    part = RunPart(name, configs=configs, pictures=pictures_of(folder, skipped))
    with skipped.trying(folder):
        part.lines = read_lines(folder)
    part.task = task_titled(record.task) or task_in(cfg) or task_titled(runs[0].task if runs else None)
    part.stage = str(record.task or (part.task.title if part.task else runs[0].task if runs else record.stage) or "")
    part.setting = setting_of(record, runs[0] if runs else None, cfg, part.stage)
    seed = record.seed if record.seed is not None else cfg.get("seed")
    part.seed = "" if seed is None else str(seed)
    part.figures = figures_of(record)
    part.facts = facts_of(part.lines, logs, record)
    part.classes = classes_of(logs)
    if record.classwise:  # in place of the logged one, which may be another run's in the same folder
        own = recorded_classes(record.classwise)
        part.classes = [own, *(it for it in part.classes if it.title != own.title)]
    part.recorded = {
        key.replace("_", " "): worded(value)
        for key, value in (record.values().items() if there else ())
        if key not in ("reported", "classwise") and value not in (None, {}, "")
    }
    return part


def texts_of(files: Sequence[Path], skipped: Skipped) -> dict[str, str]:
    """File name -> text of those that can be read."""
    found = {}
    for path in files:
        with skipped.trying(path):
            found[path.name] = read_text(path)
    return found


def task_in(cfg: Mapping[str, Any]) -> Task | None:
    """The task that a config names, if it is known here."""
    name = cfg.get("task")
    return task_named(name) if name in [task.name for task in tasks()] else None


def record_in(cfg: Mapping[str, Any]) -> Record:
    """What a run without results.json has recorded in its config."""
    origin = cfg["origin"] if isinstance(cfg.get("origin"), dict) else {}
    known = {key: origin[key] for key in ("method", "config", "pretrain_config") if isinstance(origin.get(key), str)}
    known |= {key: origin[key] for key in ("pretrain_options",) if isinstance(origin.get(key), dict)}
    known |= {key: origin[key] for key in ("pretrain_epochs",) if isinstance(origin.get(key), int)}
    known |= {key: cfg[key] for key in ("cfg_options",) if isinstance(cfg.get(key), dict)}
    known |= {"seed": cfg["seed"]} if isinstance(cfg.get("seed"), int) else {}
    known |= {"checkpoint": cfg["pretrained"]} if isinstance(cfg.get("pretrained"), str) else {}
    return record_of({"metrics": {}, **known})


def setting_of(record: Record, run: Run | None, cfg: Mapping[str, Any], stage: str) -> tuple[str, ...]:
    """`RunPart.setting`, each in words; an empty string is nothing to say."""
    network = mapping(mapping(cfg.get("model")).get("network"))
    task = task_in(cfg)
    pretrains = task is not None and task.pretrains
    described = method_of(network) if pretrains and not record.method else None
    known = described or record.method or record.checkpoint or cfg or run
    method = described.title(network) if described else method_in(record) if known else ""
    run = run or Run(method, None, stage, "", 0.0, None, "", record, "", Metric(""))
    epochs = mapping(cfg.get("train_cfg")).get("max_epochs") if pretrains else record.pretrain_epochs
    length = f"{epochs:g} epochs" if isinstance(epochs, int | float) else ""
    data = Path(record.data or str(mapping(cfg.get("dataset")).get("root") or "")).name
    return method, length, run.changes, run.config, data


def mapping(value: object) -> Mapping:
    """A mapping unchanged, anything else as an empty one: a work folder may hold any config."""
    return value if isinstance(value, Mapping) else {}


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
    if device or record.device:
        facts["device"] = record.device or device[-1]
    return facts


def stamps_of(log: str) -> list[datetime.datetime]:
    """The timestamps of a log's first and last line that have one."""
    found = [match[1] for match in map(STAMP.match, log.splitlines()) if match]
    with suppress(ValueError):  # digits that are no date
        return [datetime.datetime.strptime(stamp, "%Y/%m/%d %H:%M:%S") for stamp in (found[:1] + found[-1:])]
    return []


def in_order(parts: Iterable[RunPart]) -> dict[str, list[RunPart]]:
    """Stage -> its runs: the stages in the order of the pipeline, those that no task has after them."""
    order = [task.title for task in tasks()]
    found: dict[str, list[RunPart]] = {title: [] for title in order}
    for part in parts:
        found.setdefault(part.stage or "other runs", []).append(part)
    return {stage: runs for stage, runs in found.items() if runs}
