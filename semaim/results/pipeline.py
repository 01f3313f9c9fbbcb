"""Runs stages, each by its command, optionally several at a time; then writes the table and the report."""

import importlib.util
import os
import queue
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

from semaim.errors import UserError
from semaim.places import here, to_install
from semaim.reading import write_json
from semaim.results import load_published
from semaim.results.costs import cost_of, totals
from semaim.results.formats import FORMATS, glance
from semaim.results.running import Children, read, refuse_changes, settings_in
from semaim.results.skipping import Skipped, files_in, tell
from semaim.results.stages import PICTURES, Stage
from semaim.results.table import make_table

FILES = {"md": "table.md", "csv": "table.csv", "html": "table.html", "latex": "table.tex"}
#: The first sentences of the report at scale quick.
LEAD = (
    "These are drawn scenes at level {level}, a tiny encoder and minutes of training. They show whether the parts work"
    " together, and whether pretraining helps here; nothing about the paper's comparison of orders and methods, and"
    " nothing about photographs. For those there are the configs at paper scale."
)


def count_images(root: Path | None) -> tuple[int, int] | None:
    """Numbers of training and validation images in class folders, or None if there are none."""
    if root is None or not (root / "train").is_dir():
        return None
    train, val = (
        sum(path.suffix.lower() in PICTURES for path in (root / split).rglob("*")) for split in ("train", "val")
    )
    return train, val


def check(stages: list[Stage], chosen: list[Stage]) -> list[Stage]:
    """Before any stage starts, `UserError` for what would stop the stages or mix their results.

    Returns the chosen stages without those whose folder is broken, which are named, and those that start from them.
    """
    skipped: dict[str, str] = {}
    for stage in stages:
        if stage.needs in skipped:
            skipped[stage.title] = f"{stage.title}, which starts from {stage.needs}"
            continue
        if stage.name == "scenes":
            drawn = read(stage.result)
            for name, value in stage.options.items():
                if drawn and drawn.get(name) != value:
                    was = f"{drawn.get(name)}, now it is {value}"
                    raise UserError(f"{stage.folder} was drawn with {name} = {was}: choose another --work-dir")
        elif any((stage.folder / name).exists() for name in ("results.json", "latest.pth")):
            try:
                had = settings_in(stage.folder / "stage.json")
            except UserError as error:
                skipped[stage.title] = str(error)
                continue
            if had is None:
                raise UserError(f"{stage.folder} holds a run of another command: choose another --work-dir")
            refuse_changes(stage.folder, had, stage.settings)
    lost = [skipped[stage.title] for stage in chosen if stage.title in skipped]
    chosen = [stage for stage in chosen if stage.title not in skipped]
    if lost and not any(stage.method for stage in chosen):
        raise UserError(f"no stage is left: {lost[0]}")
    tell(lost)
    by_title = {stage.title: stage for stage in stages}
    for stage in chosen:
        needed = by_title.get(stage.needs or "")
        if needed and needed not in chosen and not needed.result.exists():
            raise UserError(f"{stage.title} needs {needed.result}, which is not there: let {needed.title} run first")
        package = stage.task and stage.task.needs
        if package and not stage.result.exists() and not importlib.util.find_spec(package):
            flags = f"{to_install('all')}, or leave it out: --skip detection segmentation"
            raise UserError(f"{stage.title}: {package} is not installed: {flags}")
    return chosen


def typed(stage: Stage) -> str:
    """The command line, with the environment variables for several nodes if it runs on several."""
    nodes = f"NNODES={stage.nodes} NODE_RANK=$NODE_RANK MASTER_ADDR=$MASTER_ADDR PORT=29500 "
    return nodes * (stage.nodes > 1) + shlex.join(stage.command())


def show(chosen: list[Stage], rates: dict[str, float]) -> None:
    """Print all commands, and what each costs."""
    if any(stage.nodes > 1 for stage in chosen):
        most = max(stage.nodes for stage in chosen)
        print(f"# On every node, with its NODE_RANK (0 to {most - 1}) and the first one's name as MASTER_ADDR;")
        print("# where NNODES is lower, or not there, on the first ones only.")
    costs = []
    for number, stage in enumerate(chosen, 1):
        print(f"# stage {number} of {len(chosen)}, {stage.title}{': has finished' * stage.result.exists()}")
        if stage.method:
            costs.append(cost_of(stage, rates))
            print(f"#   {costs[-1]}")
        print(typed(stage), flush=True)
    print(f"# {totals(costs)}")


def work_through(chosen: list[Stage], jobs: int = 1) -> int:
    """Run what has not finished, `jobs` stages at a time; returns the exit status."""
    left, code = list(chosen), 0
    running: dict[str, Stage] = {}
    ended: queue.Queue[tuple[Stage, int | BaseException]] = queue.Queue()
    with Children() as children:

        def work(stage: Stage) -> None:
            try:
                ended.put((stage, carry_out(stage, children, jobs)))
            except BaseException as error:  # it would be lost in a thread
                ended.put((stage, error))

        while True:
            waiting = {stage.title for stage in [*left, *running.values()]}
            for stage in sorted(left, key=weight_of, reverse=True) if jobs > 1 else left[:1]:
                ready = stage.needs not in waiting and (not stage.method or "scenes" not in waiting)
                if len(running) < jobs and ready and not code and not children.stopped:
                    left.remove(stage)
                    number = f"stage {chosen.index(stage) + 1} of {len(chosen)}"
                    print(f"{number}, {stage.title}:{' has finished' * stage.result.exists()}", flush=True)
                    running[stage.title] = stage
                    if jobs > 1:
                        threading.Thread(target=work, args=(stage,)).start()
                    else:
                        work(stage)
            if not running:
                break
            stage, failed = ended.get()
            del running[stage.title]
            if isinstance(failed, BaseException):
                raise failed
            if code:
                print(f"{stage.title} was stopped with it: the same command continues from there", file=sys.stderr)
            elif children.stopped:
                print(f"interrupted in {stage.title}: the same command continues from there", file=sys.stderr)
            elif failed:
                print(f"{stage.title} failed with exit status {failed}; what has finished stays", file=sys.stderr)
                code = failed
                children.stop(signal.SIGTERM)  # the other running stages save and end
        if not code and children.stopped:
            return 128 + children.stopped[0]
        if not code and left:
            raise UserError(f"{left[0].title} waits for {left[0].needs}, which waits too")
        return code


def weight_of(stage: Stage) -> int:
    """Priority of a stage when several can start: long ones first, so that short ones fill the gaps."""
    return stage.task.weight if stage.task else 100


def carry_out(stage: Stage, children: Children, jobs: int) -> int:
    """Run a stage if it has not finished, then make its pictures for the report; returns the exit status.

    A failed picture stops nothing.
    """
    title = stage.title if jobs > 1 else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Each job gets its share of the cores: more threads would wait for each other.
    shared = {} if jobs == 1 or "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, cores // jobs))}
    if not stage.result.exists():
        if stage.method:
            stage.folder.mkdir(parents=True, exist_ok=True)
            record = {"settings": stage.settings, "processes": stage.gpus}
            write_json(stage.folder / "stage.json", record)
        print(typed(stage), flush=True)
        begun = time.monotonic()
        code = children.follow(stage.command(), title, shared)
        if children.stopped or code or not stage.result.exists():
            return code or 1
        print(f"{stage.title} took {time.monotonic() - begun:.0f} s", flush=True)
    for file, line in stage.drawings():
        if file.exists() or children.stopped:
            continue
        print(shlex.join(line), flush=True)
        if children.follow(line, title, shared) and not children.stopped:
            print(f"{stage.title}: {file.name} could not be made: it will be missing from the report", file=sys.stderr)
    return 0


def tabulate(work: Path, scale: str, lead: str | None = None) -> None:
    """Write the table in all formats, and the report, which begins with `lead`; print our rows.

    At paper scale they are printed together with the published ones.
    """
    if not any(path.name == "results.json" for path in files_in(work, Skipped())):
        print("no stage that measures has finished yet: there is no table")
        return
    catalogue = load_published()
    table = make_table([work], catalogue)
    if not importlib.util.find_spec("semaim.results.report"):
        tell(table.skipped)
    written = []
    for name, file in FILES.items():
        head = '<!doctype html>\n<meta charset="utf-8">\n' * (name == "html")
        (work / file).write_text(head + FORMATS[name](table), encoding="utf-8")
        written.append(work / file)
    if importlib.util.find_spec("semaim.results.report"):
        from semaim.results.report import write_report

        tell(write_report([work], work / "report.html", lead))
        written.append(work / "report.html")
    shown = table if scale == "paper" else make_table([work], catalogue, published=False)
    print(f"\n{FORMATS['md'](shown)}\n{glance(table)}\nwritten: {', '.join(map(here, written))}")
