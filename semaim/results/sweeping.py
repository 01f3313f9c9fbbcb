"""Runs of one config with several learning rates and layer decays, one after another, and their table."""

import argparse
import csv
import itertools
import math
import os
import shlex
import sys
from decimal import Decimal
from pathlib import Path

from rich.console import Console
from rich.table import Table

from semaim.engine.config import load_config
from semaim.engine.locking import work_folder
from semaim.errors import Diverged, UserError
from semaim.places import is_name
from semaim.reading import write_json
from semaim.record import Record, read_record
from semaim.registry import Metric, task_titled, tasks
from semaim.results.running import as_words, follow, read, refuse_changes, settings_in, shortened, tool
from semaim.results.runs import metrics_in
from semaim.results.skipping import Skipped, tell

DECAY = "optim_wrapper.paramwise_cfg.layer_decay"


def short(number: float) -> str:
    """A number with all digits, in its shortest form: 0.0001 -> 1e-4, 0.65 -> 0.65."""
    return f"{Decimal(repr(float(number))).normalize():{'f' if number >= 0.01 else 'e'}}"


def plan(args: argparse.Namespace) -> dict[str, dict]:
    """Name of every run -> its record, which is stored as `sweep.json` in its folder."""
    given = args.cfg_options or {}
    cfg = load_config(args.config, given)
    if not cfg.get("base_lr") or cfg.model.type == "Pretraining":
        raise UserError(f"{args.config}: a sweep needs a stage with a base_lr that is validated")
    decay = (cfg.optim_wrapper.get("paramwise_cfg") or {}).get("layer_decay")
    if args.layer_decay and decay is None:
        raise UserError(f"{args.config} has no layer decay ({DECAY}): leave --layer-decay out")
    for flag, key, values in (("--lr", "base_lr", args.lr), ("--layer-decay", DECAY, args.layer_decay)):
        if values and key in given:
            raise UserError(f"{key} is given twice, by {flag} and by --cfg-options")
        for value in values or ():
            if not 0 < value < math.inf or key == DECAY and value > 1:
                raise UserError(f"{flag} {value:g}: give numbers above 0" + ", at most 1" * (key == DECAY))
    options = given | shortened(cfg, args.iters, args.epochs)
    paths = {"config": args.config, "pretrained": args.pretrained, "data_root": args.data_root}
    whole = {name: path if is_name(path) else path and str(Path(path).resolve()) for name, path in paths.items()}
    settings = {
        **whole,  # latest.pth is a moving link
        "options": as_words(options),
    }
    runs = {}
    for lr, tried in itertools.product(args.lr or [cfg.base_lr], args.layer_decay or [None]):
        runs[f"lr{short(lr)}" + (f"_ld{short(tried)}" if tried else "")] = {
            "base_lr": lr,
            "peak_lr": lr * cfg.total_batch_size / cfg.get("base_batch_size", 256),
            "layer_decay": tried or decay,
            "settings": settings,
        }
    return runs


def check_folder(work: Path, runs: dict[str, dict]) -> set[str]:
    """The runs that are broken, which are named; `UserError` if the folder has runs with other settings.

    A table must not mix them.
    """
    broken: set[str] = set()
    skipped = Skipped()
    settings = next(iter(runs.values()))["settings"]
    for folder in sorted({work / name for name in runs} | {path.parent for path in work.glob("*/sweep.json")}):
        if not any(os.path.lexists(folder / name) for name in ("results.json", "latest.pth")):
            continue
        try:
            had = settings_in(folder / "sweep.json")
            if os.path.lexists(folder / "results.json"):
                read_record(folder / "results.json")
        except UserError as error:
            skipped.add(str(error))
            broken.add(folder.name)
            continue
        if had is None:
            raise UserError(f"{folder} holds a run that no sweep started: choose another --work-dir")
        refuse_changes(folder, had, settings)
    if broken >= runs.keys():
        raise skipped.nothing("run")
    tell(skipped.lines)
    return broken


def command(args: argparse.Namespace, folder: Path, record: dict) -> list[str]:
    """The command line of a run, as it would be typed here."""
    line = [*tool("train"), args.config, "--gpus", args.gpus, "--work-dir", str(folder)]
    line += ["--pretrained", args.pretrained] if args.pretrained else []
    line += ["--data-root", args.data_root] if args.data_root else []
    line += ["--resume"] if os.path.lexists(folder / "latest.pth") else []
    options = {**record["settings"]["options"], "base_lr": short(record["base_lr"])}
    if args.layer_decay:
        options[DECAY] = short(record["layer_decay"])
    return [*line, "--cfg-options", *(f"{key}={value}" for key, value in options.items())]


def sweep(args: argparse.Namespace, work: Path) -> int:
    """Train what has not finished; returns the exit status."""
    runs = plan(args)
    broken = check_folder(work, runs)
    with work_folder(work):
        return _train(args, work, runs, broken)


def _train(args: argparse.Namespace, work: Path, runs: dict[str, dict], broken: set[str]) -> int:
    for number, (name, record) in enumerate(runs.items(), 1):
        folder = work / name
        title = f"run {number} of {len(runs)}, {name}:"
        if name in broken:
            print(title, "is skipped", flush=True)
            continue
        if read(folder / "results.json").get("metrics"):
            print(title, "has finished", flush=True)
            continue
        if read(folder / "sweep.json").get("diverged"):
            print(title, "has diverged", flush=True)
            continue
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "sweep.json", record)
        line = command(args, folder, record)
        print(f"{title}\n{shlex.join(line)}", flush=True)
        code, stopped = follow(line)
        if stopped:
            print(f"interrupted in {name}: the same command continues from there", file=sys.stderr)
            return 128 + stopped
        if code == Diverged.status:
            write_json(folder / "sweep.json", {**record, "diverged": True})
        elif code:
            print(f"{name} failed with exit status {code}; what has finished stays", file=sys.stderr)
            return code
    return 0


def metrics_of(record: Record | None) -> dict[str, Metric]:
    """The metrics of a run's task to show, the deciding one first."""
    task = task_titled(record.task if record else None)
    if task is None and record and record.reported:
        return metrics_in(record.reported)
    found = [(name, metric) for it in ([task] if task else tasks()) for name, metric in it.metrics.items()]
    return {name: metric for name, metric in found if metric.tabled or name == "loss"}


def rates_in(path: Path) -> dict:
    """What a sweep.json says of its run; `UserError` if it is broken."""
    found = read(path)
    for name in ("base_lr", "peak_lr", "layer_decay"):
        value = found.get(name)
        if type(value) not in (int, float) and not (name == "layer_decay" and value is None):
            raise UserError(f"{path} is broken: {name} is {value!r:.60}")
    return {name: found.get(name) for name in ("base_lr", "peak_lr", "layer_decay", "diverged")}


def collect(work: Path, metric: str | None) -> tuple[list[dict], list[str]]:
    """The runs in a folder, the best first, and the metrics to show, the deciding one first."""
    rows: list[dict] = []
    known_metrics: dict[str, Metric] = {}
    skipped = Skipped()
    for path in sorted(work.glob("*/sweep.json")):
        with skipped.trying(path):
            results = path.with_name("results.json")
            record = read_record(results) if os.path.lexists(results) else None
            described = metrics_of(record)
            rows.append({"run": path.parent.name, "metrics": record.metrics if record else {}, **rates_in(path)})
            known_metrics |= described
    if not rows and skipped.lines:
        raise skipped.nothing("run")
    tell(skipped.lines)
    known = {name for row in rows for name in row["metrics"]}
    if not known:
        raise UserError(f"no run in {work} has measured anything yet")
    if metric and metric not in known:
        raise UserError(f"no metric {metric} in the results: known are {', '.join(sorted(known))}")
    shown = [name for name in known_metrics if name in known] or sorted(known)
    shown = list(dict.fromkeys([metric or shown[0], *shown]))

    def rank(row: dict) -> tuple:
        value = row["metrics"].get(shown[0], math.nan)
        higher = known_metrics[shown[0]].higher_is_better if shown[0] in known_metrics else "loss" not in shown[0]
        return math.isnan(value), -value if higher else value, row["base_lr"], row["layer_decay"] or 0

    return sorted(rows, key=rank), shown


def remarks(rows: list[dict], metric: str) -> list[str]:
    """Remarks: whether the best is at the border of the values tried, and which runs have no figures."""
    lines, top = [], rows[0]["metrics"][metric]
    for key in ("base_lr", "layer_decay"):
        tried = sorted({row[key] for row in rows if row["metrics"]} - {None})
        best, *equal = {row[key] for row in rows if row["metrics"].get(metric) == top}
        if len(tried) > 1 and not equal and best in (tried[0], tried[-1]) and (key, best) != ("layer_decay", 1):
            side, further = ("lowest", "lower") if best == tried[0] else ("highest", "higher")
            lines.append(f"The best {key}, {short(best)}, is the {side} that was tried: try {further} ones too.")
    if diverged := [row["run"] for row in rows if row.get("diverged")]:
        lines.append(f"Diverged: {', '.join(diverged)}.")
    if missing := [row["run"] for row in rows if not row["metrics"] and not row.get("diverged")]:
        lines.append(f"Not finished, or nothing was predicted: {', '.join(missing)}.")
    return lines


def tabulate(work: Path, metric: str | None) -> None:
    """Print the table, and write `sweep.md` and `sweep.csv`."""
    rows, metrics = collect(work, metric)
    plain = ("run", "base_lr", "peak_lr", "layer_decay")
    header = [*plain, *metrics, ""]
    values = [[*(row[key] for key in plain), *map(row["metrics"].get, metrics), ""] for row in rows]
    values[0][-1] = "best"
    text = [["-" if v is None else v if isinstance(v, str) else f"{v:.4g}" for v in line] for line in values]
    notes = remarks(rows, metrics[0])
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *text)]
    (work / "sweep.md").write_text("\n".join([*lines, *(f"\n{note}" for note in notes)]) + "\n")
    with open(work / "sweep.csv", "w", newline="") as file:
        csv.writer(file).writerows([[*header[:-1], "best"], *values])
    if sys.stdout.isatty():
        table = Table(*header, box=None)
        for cells in text:
            table.add_row(*cells, style="bold green" if cells[-1] else "")
        Console().print(table)
    else:  # long lines are better than wrapped ones
        print("\n".join(lines))
    print("\n".join([*notes, f"written: {work / 'sweep.md'}, {work / 'sweep.csv'}"]))
