"""Measure a checkpoint: tools/test.py CONFIG FILE --data-root DIR (see --help)."""

import argparse
from pathlib import Path

from semaim.cli.options import NODES, STATUSES, add_flags
from semaim.errors import UserError


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Measure an encoder or a trained network as CONFIG says: k-NN, probes and further tasks of frozen"
        " features, a classifier's accuracy, box and mask AP, mIoU.",
        epilog=f"{NODES} {STATUSES}",
    )
    parser.add_argument("config", metavar="CONFIG", help="config file")
    parser.add_argument(
        "checkpoint",
        nargs="?",
        metavar="SOURCE",
        help="checkpoint of any dialect, timm:NAME[.TAG], hf-hub:OWNER/REPO, local-dir:DIR; or: random",
    )
    parser.add_argument("processes", nargs="?", metavar="GPUS", help="the same as --gpus")
    parser.add_argument("--pretrained", metavar="SOURCE", help="the same as SOURCE, as semaim train takes it")
    parser.add_argument(
        "--tasks",
        metavar="NAME,...",
        help="with a config of frozen features: measure several tasks in one pass over the images, such as"
        " knn,fast_probe,fast_attentive; results in WORK_DIR/NAME",
    )
    parser.add_argument(
        "--test-root",
        action="append",
        metavar="NAME=DIR",
        help="a further test set of the same classes, in class folders, such as imagenet-a=DIR, for frozen features:"
        " semaim/configs/test_sets, or --tasks test_sets; may be given several times",
    )
    parser.add_argument("--tta", action="store_true", help="average a segmentor over scales and flips")
    add_flags(parser, "--data-root", "--classes", "--data", "--arch", "--work-dir", "--allow-partial")
    add_flags(parser, "--gpus", "--timeout", "--cfg-options")
    parser.set_defaults(timeout=3600.0)  # one process may fit a probe while the others wait
    return parser.parse_args(argv)


def roots_of(given: list[str]) -> dict[str, str]:
    """NAME=DIR of every --test-root; `UserError` if it is something else."""
    found = {}
    for text in given:
        name, sign, folder = text.partition("=")
        if not (name and sign and folder):
            raise UserError(f"--test-root {text}: give NAME=DIR, such as imagenet-a=data/imagenet-a")
        if name in found:
            raise UserError(f"--test-root {name} is given twice: give every set a name of its own")
        found[name] = folder
    return found


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    args = parse_args(argv, prog)
    from semaim.engine.config import load_config  # takes seconds, as what follows
    from semaim.engine.launcher import command
    from semaim.engine.locking import work_folder
    from semaim.engine.own_data import set_data
    from semaim.engine.testing import prepare_test, test
    from semaim.reading import read_once

    cfg = load_config(args.config, args.cfg_options)
    if args.tta:
        cfg.tta = True
    if args.tasks is not None:
        cfg.tasks = [name.strip() for name in args.tasks.split(",")]
    if args.test_root:
        cfg.test_roots = {**(cfg.get("test_roots") or {}), **roots_of(args.test_root)}
    weights = args.checkpoint or args.pretrained
    if args.arch:
        cfg.arch = args.arch
    if args.allow_partial:
        cfg.allow_partial = True
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("work_dirs") / Path(args.config).stem)

    with work_folder(cfg.work_dir), read_once():
        set_data(cfg, args.data_root, args.data, args.classes)
        return command(
            lambda processes: prepare_test(cfg, weights),
            lambda prepared: test(cfg, weights, prepared),
            args.processes or args.gpus,
            args.timeout,
        )
