"""From images to the results table: tools/reproduce.py --scale quick --work-dir work_dirs/quick (see --help)."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from semaim.cli.choices import SCALES
from semaim.errors import UserError, nearest

if TYPE_CHECKING:
    from semaim.results.stages import Stage


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Pretrain, measure and fine-tune, detect and segment, for every method, each stage by the command"
        " that is printed; then write the results table: table.md, .csv, .html, .tex in the work folder.",
        epilog="Started again, it skips finished stages and resumes the one that was interrupted.",
    )
    parser.add_argument(
        "--scale", required=True, choices=SCALES,
        help="quick: built-in scenes, on a CPU, minutes; study: small data, one GPU; paper: ImageNet, COCO, ADE20K",
    )  # fmt: skip
    parser.add_argument("--work-dir", metavar="DIR", help="folder of all runs (default: work_dirs/SCALE)")
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD",
        help="default: at scale quick semaim and scratch, else all that the paper compares; see --list",
    )  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="one run for each (default: 0)")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="such as pretrain, knn; see --list")
    parser.add_argument("--skip", nargs="+", metavar="STAGE", default=[], help="all stages except these")
    parser.add_argument("--list", action=ListAction, help="list methods and stages, and exit")
    parser.add_argument(
        "--import", nargs="+", metavar="MODULE", default=[], dest="modules",
        help="modules that register your own methods and tasks, like a config's custom_imports",
    )  # fmt: skip
    parser.add_argument("--gpus", metavar="N", help="GPUs per node, or all (default: 1, at paper scale 8)")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="with --dry-run: for several nodes")
    parser.add_argument(
        "--length", nargs="+", action="extend", default=[], metavar="STAGE=N",
        help="epochs (pretrain, finetune) or steps (detection, segmentation); images=N, size=N of the scenes",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N",
        help="number of stages to run at the same time, each with its share of the CPU cores (default: 1)",
    )  # fmt: skip
    data = parser.add_argument_group("data")
    data.add_argument("--scenes", metavar="DIR", help="quick: where to draw them (default: in the work folder)")
    data.add_argument("--cifar", metavar="DIR", help="study: class folders, DIR/train/CLASS and DIR/val/CLASS")
    data.add_argument("--imagenet", metavar="DIR", help="paper: class folders (default: data/imagenet)")
    data.add_argument("--coco", metavar="DIR", help="in COCO's layout; study: without it, no detection")
    data.add_argument("--ade", metavar="DIR", help="in ADE20K's layout; study: without it, no segmentation")
    cost = parser.add_argument_group("cost")
    cost.add_argument("--dry-run", action="store_true", help="print all commands and what each costs; run nothing")
    cost.add_argument(
        "--rate", nargs="+", action="extend", default=[], metavar="STAGE=N",
        help="images per second and GPU of STAGE or METHOD/STAGE (default: as an earlier run here logged)",
    )  # fmt: skip
    return parser.parse_args(argv)


class ListAction(argparse.Action):
    """Prints what --methods, --only and --skip accept."""

    def __init__(self, **kwargs):
        super().__init__(nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, namespace, values, option_string=None) -> None:
        """Print, and exit."""
        from semaim.registry import variants  # takes seconds
        from semaim.results.stages import stage_names

        print(f"methods: {', '.join(variants())}\nstages: {', '.join(stage_names())}")
        parser.exit()


def check_names(args: argparse.Namespace) -> None:
    """`UserError` for an unknown method or stage."""
    from semaim.registry import variants
    from semaim.results.stages import stage_names

    for flag, given, known in (
        ("--methods", args.methods, list(variants())),
        ("--only", args.only, stage_names()),
        ("--skip", args.skip, stage_names()),
    ):
        for name in given or ():
            if name not in known:
                raise UserError(f"{flag} {name}: {nearest(name, known)}")


def lengths(words: list[str]) -> dict[str, int]:
    """NAME=N -> numbers by name."""
    pairs = [word.partition("=")[::2] for word in words]
    for name, number in pairs:
        if not number.isdigit():
            raise UserError(f"--length {name}{'=' * bool(number)}{number}: write STAGE=N, a whole number")
    return {name: int(number) for name, number in pairs}


def roots(args: argparse.Namespace) -> dict[str, Path | None]:
    """Folders of the images by kind; `UserError` for a flag of another scale or a missing folder."""
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


def choose(stages: list[Stage], args: argparse.Namespace) -> list[Stage]:
    """The chosen stages; `UserError` if one needs a pretraining that neither exists nor is chosen."""
    from semaim.results.stages import stage_names

    names = {"scenes", *(args.only or stage_names())} - set(args.skip)
    chosen = [stage for stage in stages if stage.name in names]
    if not any(stage.method for stage in chosen):
        raise UserError("no stage is left: see --only, --skip and the folders of data")
    return chosen


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    args = parse_args(argv, prog)
    from semaim.engine.launcher import check_processes, launched  # takes seconds, as what follows
    from semaim.engine.locking import work_folder
    from semaim.registry import import_modules
    from semaim.results.costs import parse_rates
    from semaim.results.pipeline import LEAD, check, count_images, show, tabulate, work_through
    from semaim.results.running import read
    from semaim.results.stages import plan, stage_tasks

    import_modules(args.modules)
    check_names(args)
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
    for name, task in stage_tasks(args.scale).items():
        if args.scale == "study" and not folders[task.source] and name in {*(args.only or [name])} - {*args.skip}:
            print(f"{name} is left out: there is no --{task.source} DIR", flush=True)
    if args.dry_run:
        show(chosen, rates)
        return 0
    chosen = check(stages, chosen)
    with work_folder(work):
        code = work_through(chosen, args.jobs)
        if code == 0:
            drawn = [read(stage.result) for stage in stages if stage.name == "scenes"]
            tabulate(work, args.scale, LEAD.format(level=drawn[0].get("level", "normal")) if drawn else None)
    return code
