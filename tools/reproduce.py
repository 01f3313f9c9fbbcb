#!/usr/bin/env python
"""From images to the results table: tools/reproduce.py --scale quick --work-dir work_dirs/quick (see --help)."""

import argparse
import importlib.util
import json
import os
import queue
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

from semaim.engine.launcher import check_processes, launched
from semaim.errors import UserError, check_work_dir, run
from semaim.registry import variants
from semaim.results import load_published
from semaim.results.costs import cost_of, parse_rates, totals
from semaim.results.formats import FORMATS, glance
from semaim.results.running import Children, here, read, refuse_changes
from semaim.results.stages import PICTURES, SCALES, Stage, default_methods, plan, stage_names, stage_tasks
from semaim.results.table import make_table

FILES = {"md": "table.md", "csv": "table.csv", "html": "table.html", "latex": "table.tex"}
#: What the report of scale quick says first.
LEAD = (
    "These are drawn scenes at level {level}, a tiny encoder and minutes of training. They show whether the parts work"
    " together, and whether pretraining helps here; nothing about the paper's comparison of orders and methods, and"
    " nothing about photographs. For those there are the configs at paper scale."
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Pretrain, measure and fine-tune, detect and segment, for every method, each stage by the command"
        " that is printed; then write the results table: table.md, .csv, .html, .tex in the work folder.",
        epilog="Started again it skips the stages that have finished and goes on with the one that was cut.",
    )
    parser.add_argument(
        "--scale", required=True, choices=SCALES,
        help="quick: built-in scenes, on a CPU, minutes; study: small data, one GPU; paper: ImageNet, COCO, ADE20K",
    )  # fmt: skip
    parser.add_argument("--work-dir", metavar="DIR", help="folder of all runs (default: work_dirs/SCALE)")
    methods, stages = list(variants()), stage_names()
    default = f"(default: quick, {' '.join(default_methods('quick'))}; else {' '.join(default_methods('paper'))})"
    parser.add_argument(
        "--methods", nargs="+", choices=methods, metavar="METHOD", help=f"{', '.join(methods)} {default}"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="one run of each (default: 0)")
    parser.add_argument("--only", nargs="+", choices=stages, metavar="STAGE", help=f"of {', '.join(stages)}")
    parser.add_argument("--skip", nargs="+", choices=stages, metavar="STAGE", default=[], help="all but these")
    parser.add_argument("--gpus", metavar="N", help="of each node; all for all (default: 1, at paper scale 8)")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="with --dry-run: commands for several")
    parser.add_argument(
        "--length", nargs="+", action="extend", default=[], metavar="STAGE=N",
        help="epochs (pretrain, finetune) or steps (detection, segmentation); images=N, size=N of the scenes",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N",
        help="run so many stages side by side, each with its share of the CPU's cores (default: 1)",
    )  # fmt: skip
    data = parser.add_argument_group("data")
    data.add_argument("--scenes", metavar="DIR", help="quick: where they are drawn (default: in the work folder)")
    data.add_argument("--cifar", metavar="DIR", help="study: class folders, DIR/train/CLASS and DIR/val/CLASS")
    data.add_argument("--imagenet", metavar="DIR", help="paper: class folders (default: data/imagenet)")
    data.add_argument("--coco", metavar="DIR", help="as COCO; study: without it, no detection")
    data.add_argument("--ade", metavar="DIR", help="as ADE20K; study: without it, no segmentation")
    cost = parser.add_argument_group("cost")
    cost.add_argument("--dry-run", action="store_true", help="print all commands and what each costs; run nothing")
    cost.add_argument(
        "--rate", nargs="+", action="extend", default=[], metavar="STAGE=N",
        help="images per second and GPU of a stage, or of METHOD/STAGE; else what an earlier run here has logged",
    )  # fmt: skip
    return parser.parse_args()


def lengths(words: list[str]) -> dict[str, int]:
    """NAME=N -> numbers by name."""
    pairs = [word.partition("=")[::2] for word in words]
    for name, number in pairs:
        if not number.isdigit():
            raise UserError(f"--length {name}{'=' * bool(number)}{number}: write STAGE=N, a whole number")
    return {name: int(number) for name, number in pairs}


def roots(args: argparse.Namespace) -> dict[str, Path | None]:
    """Folders of the images by kind; `UserError` for a flag of another scale, and for a folder that is not there."""
    taken = {"quick": ("scenes",), "study": ("cifar", "coco", "ade"), "paper": ("imagenet", "coco", "ade")}[args.scale]
    given = {name: getattr(args, name) for name in ("scenes", "cifar", "imagenet", "coco", "ade")}
    for name, path in given.items():
        if path and name not in taken:
            raise UserError(f"--{name} is not for scale {args.scale}, which takes --{', --'.join(taken)}")
        if path and name != "scenes" and not args.dry_run and not Path(path).is_dir():
            raise UserError(f"--{name} {path}: no such folder")
    if args.scale == "study" and not args.cifar:
        raise UserError("scale study needs images: --cifar DIR, with DIR/train/CLASS and DIR/val/CLASS")
    paths = {name: path and Path(path) for name, path in given.items()}
    return {**paths, "images": paths["cifar"] or paths["imagenet"]}


def count_images(root: Path | None) -> tuple[int, int] | None:
    """Training and validation images in class folders, or None where there are none."""
    if root is None or not (root / "train").is_dir():
        return None
    return tuple(
        sum(path.suffix.lower() in PICTURES for path in (root / split).rglob("*")) for split in ("train", "val")
    )


def choose(stages: list[Stage], args: argparse.Namespace) -> list[Stage]:
    """The stages asked for; `UserError` where one needs a pretraining that is neither there nor asked for."""
    names = {"scenes", *(args.only or stage_names())} - set(args.skip)
    chosen = [stage for stage in stages if stage.name in names]
    if not any(stage.method for stage in chosen):
        raise UserError("no stage is left: see --only, --skip and the folders of data")
    return chosen


def check(stages: list[Stage], chosen: list[Stage]) -> None:
    """`UserError` for what would stop the stages, or mix their results, before any starts."""
    for stage in stages:
        if stage.name == "scenes":
            drawn = read(stage.result)
            for name, value in stage.options.items():
                if drawn and drawn.get(name) != value:
                    was = f"{drawn.get(name)}, now it is {value}"
                    raise UserError(f"{stage.folder} was drawn with {name} = {was}: choose another --work-dir")
        elif any((stage.folder / name).exists() for name in ("results.json", "latest.pth")):
            had = read(stage.folder / "stage.json").get("settings")
            if had is None:
                raise UserError(f"{stage.folder} holds a run of other origin: choose another --work-dir")
            refuse_changes(stage.folder, had, stage.settings)
    by_title = {stage.title: stage for stage in stages}
    for stage in chosen:
        needed = by_title.get(stage.needs)
        if needed and needed not in chosen and not needed.result.exists():
            raise UserError(f"{stage.title} needs {needed.result}, which is not there: let {needed.title} run first")
        package = stage.task and stage.task.needs
        if package and not stage.result.exists() and not importlib.util.find_spec(package):
            flags = "tools/setup.sh --extras all, or leave it out: --skip detection segmentation"
            raise UserError(f"{stage.title}: {package} is not installed: {flags}")


def typed(stage: Stage) -> str:
    """The command line, with the environment of several nodes where it runs on them."""
    nodes = f"NNODES={stage.nodes} NODE_RANK=$NODE_RANK MASTER_ADDR=$MASTER_ADDR PORT=29500 "
    return nodes * (stage.nodes > 1) + shlex.join(stage.command())


def show(chosen: list[Stage], rates: dict[str, float]) -> None:
    """All commands, and what each costs."""
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
    """Run what has not finished, `jobs` stages at a time; the exit status."""
    left, running, code = list(chosen), {}, 0
    ended: queue.Queue[tuple[Stage, int | BaseException]] = queue.Queue()
    with Children() as children:

        def work(stage: Stage) -> None:
            try:
                ended.put((stage, carry_out(stage, children, jobs)))
            except BaseException as error:  # in a thread nobody would see it
                ended.put((stage, error))

        while True:
            waiting = {stage.title for stage in [*left, *running.values()]}
            for stage in sorted(left, key=weight, reverse=True) if jobs > 1 else left[:1]:
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
                print(f"{stage.title} was ended beside it: the same command goes on from there", file=sys.stderr)
            elif children.stopped:
                print(f"interrupted in {stage.title}: the same command goes on from there", file=sys.stderr)
            elif failed:
                print(f"{stage.title} failed with exit status {failed}; what has finished stays", file=sys.stderr)
                code = failed
                children.stop(signal.SIGTERM)  # those beside it save and end
        if not code and children.stopped:
            return 130
        if not code and left:
            raise UserError(f"{left[0].title} waits for {left[0].needs}, which waits too")
        return code


def weight(stage: Stage) -> int:
    """Which stages begin first, where several can: the short ones then fill what is left."""
    return stage.task.weight if stage.task else 100


def carry_out(stage: Stage, children: Children, jobs: int) -> int:
    """Run a stage to its end, where it has not finished, and what else the report shows of it; the exit status.

    A failure of the latter stops nothing.
    """
    title = stage.title if jobs > 1 else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Each with its share of the cores: more threads than those would wait for one another.
    shared = {} if jobs == 1 or "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, cores // jobs))}
    if not stage.result.exists():
        if stage.method:
            stage.folder.mkdir(parents=True, exist_ok=True)
            record = {"settings": stage.settings, "processes": stage.gpus}
            (stage.folder / "stage.json").write_text(json.dumps(record, indent=2) + "\n")
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
            print(f"{stage.title}: {file.name} could not be made: it will be missing in the report", file=sys.stderr)
    return 0


def tabulate(work: Path, scale: str, lead: str | None = None) -> None:
    """Write the table in all formats, and the report, which opens with `lead`; print our rows.

    At paper scale they are printed beside the published.
    """
    if not any(work.rglob("results.json")):
        print("no stage that measures has finished yet: there is no table")
        return
    catalogue = load_published()
    table = make_table([work], catalogue)
    written = []
    for name, file in FILES.items():
        head = '<!doctype html>\n<meta charset="utf-8">\n' * (name == "html")
        (work / file).write_text(head + FORMATS[name](table), encoding="utf-8")
        written.append(work / file)
    if importlib.util.find_spec("semaim.results.report"):
        from semaim.results.report import write_report

        write_report([work], work / "report.html", lead)
        written.append(work / "report.html")
    shown = table if scale == "paper" else make_table([work], catalogue, published=False)
    print(f"\n{FORMATS['md'](shown)}\n{glance(table)}\nwritten: {', '.join(map(here, written))}")


def main() -> int:
    args = parse_args()
    if launched() or os.environ.get("NNODES", "1") != "1":
        raise UserError("this tool is started once and starts the others: give --gpus N")
    work = Path(args.work_dir or Path("work_dirs") / args.scale)
    gpus = args.gpus or ("8" if args.scale == "paper" else "1")
    gpus = int(gpus) if args.dry_run and gpus.isdigit() and int(gpus) else check_processes(gpus)
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: give 1 or more")
    if args.nodes < 1:
        raise UserError(f"--nodes {args.nodes}: give 1 or more")
    if args.nodes > 1 and not args.dry_run:
        raise UserError("several nodes: print the commands with --dry-run, and start each on every node")
    folders, rates = roots(args), parse_rates(args.rate)
    counted = count_images(folders["images"]) if args.scale == "study" else None
    given = lengths(args.length)
    stages = plan(args.scale, work, args.methods, args.seeds, folders, given, counted, gpus, args.nodes)
    chosen = choose(stages, args)
    for name in [name for name in stage_tasks(args.scale) if name in {*(args.only or stage_names())} - {*args.skip}]:
        source = stage_tasks(args.scale)[name].source
        if args.scale == "study" and not folders[source]:
            print(f"{name} is left out: there is no --{source} DIR", flush=True)
    if args.dry_run:
        show(chosen, rates)
        return 0
    check(stages, chosen)
    check_work_dir(work)
    code = work_through(chosen, args.jobs)
    if code == 0:
        drawn = [read(stage.result) for stage in stages if stage.name == "scenes"]
        tabulate(work, args.scale, LEAD.format(level=drawn[0].get("level", "normal")) if drawn else None)
    return code


if __name__ == "__main__":
    sys.exit(run(main))
