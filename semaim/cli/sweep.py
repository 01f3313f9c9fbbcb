"""Search learning rate and layer decay: tools/sweep.py CONFIG --lr 1e-4 2e-4 --layer-decay 0.65 0.75 (see --help)."""

import argparse
import os
from pathlib import Path

from semaim.cli.options import add_flags
from semaim.errors import UserError


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Train once for every combination of learning rate and layer decay, one run after the other, each"
        " by the tools/train.py command that is printed, and tabulate what they reach: DIR/sweep.md, DIR/sweep.csv.",
        epilog="Started again, it skips finished runs and resumes the one that was interrupted; with further rates it"
        " runs those, and the table has all. --iters and --epochs keep the shape of the schedule: warm-up and"
        " milestones keep their shares of the run, which is validated at its end.",
    )
    parser.add_argument("config", metavar="CONFIG", help="config file of any stage with a base_lr that is validated")
    parser.add_argument("--lr", nargs="+", type=float, metavar="LR", help="values of base_lr (default: the config's)")
    parser.add_argument("--layer-decay", nargs="+", type=float, metavar="D", help="values of the layer decay")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--iters", type=int, metavar="N", help="steps of each run: detection and segmentation")
    length.add_argument("--epochs", type=int, metavar="N", help="epochs of each run: fine-tuning and linear probing")
    parser.add_argument("--metric", metavar="NAME", help="metric that decides (default: mIoU, box mAP, or top1)")
    parser.add_argument("--table", action="store_true", help="train nothing, only print the table of existing runs")
    parser.add_argument("--work-dir", metavar="DIR", help="folder of the runs (default: work_dirs/CONFIG_sweep)")
    common = parser.add_argument_group("as for tools/train.py")
    add_flags(common, "--data-root", "--pretrained", "--gpus", "--cfg-options")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    args = parse_args(argv, prog)
    from semaim.engine.launcher import launched  # takes seconds, as what follows
    from semaim.results.sweeping import sweep, tabulate

    if launched() or os.environ.get("NNODES", "1") != "1":
        raise UserError("a sweep runs on one machine and is started once: give --gpus N")
    work = Path(args.work_dir or Path("work_dirs") / f"{Path(args.config).stem}_sweep")
    code = 0 if args.table else sweep(args, work)
    if code == 0:
        tabulate(work, args.metric)
    return code
