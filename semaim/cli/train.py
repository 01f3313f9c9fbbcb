"""Train a stage: tools/train.py CONFIG --pretrained FILE --data-root DIR (see --help)."""

import argparse
from pathlib import Path

from semaim.cli.options import NODES, STATUSES, add_flags
from semaim.errors import UserError, check_work_dir


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Train what the config says: pretraining, fine-tuning, a linear probe, a detector, a segmentor.",
        epilog=f"{NODES} {STATUSES}",
    )
    parser.add_argument("config", help="config file")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="FILE",
        help="continue, with the run's own settings, from FILE or the newest checkpoint in the work folder",
    )
    parser.add_argument(
        "--override", action="store_true", help="with --resume: options given here replace the run's own"
    )
    parser.add_argument(
        "--strict-data",
        action="store_true",
        help="with --resume: stop if names or sizes of the images have changed since the checkpoint; else a warning",
    )
    parser.add_argument(
        "--rescue-dir", metavar="DIR", help="where the run's state is saved if the work folder is full or read-only"
    )
    add_flags(parser, "--data-root", "--classes", "--data")
    add_flags(parser, "--pretrained", "--arch", "--work-dir", "--allow-partial")
    add_flags(parser, "--wandb", "--mlflow", "--gpus", "--timeout", "--cfg-options")
    return parser


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    args = make_parser(prog).parse_args(argv)
    from semaim.engine.config import load_config  # takes seconds, as what follows
    from semaim.engine.launcher import command
    from semaim.engine.locking import work_folder
    from semaim.engine.own_data import set_data
    from semaim.engine.resuming import resume_settings
    from semaim.engine.training import prepare_training, train
    from semaim.reading import read_once

    cfg = load_config(args.config, args.cfg_options)
    given = dict(args.cfg_options or {})
    if args.pretrained:
        cfg.pretrained = given["pretrained"] = args.pretrained
    if args.arch:
        cfg.arch = given["arch"] = args.arch
    for tracker in ("wandb", "mlflow"):
        if (name := getattr(args, tracker)) is not None:
            cfg.trackers = {**(cfg.get("trackers") or {}), tracker: name}
            given[f"trackers.{tracker}"] = name
    if args.allow_partial:
        cfg.allow_partial = True
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("work_dirs") / Path(args.config).stem)
    if args.strict_data and args.resume is None:
        raise UserError("--strict-data is for --resume: it compares the data with those of the checkpoint")
    with work_folder(cfg.work_dir), read_once():
        given |= set_data(cfg, args.data_root, args.data, args.classes)
        resume_from, notes = resume_settings(cfg, given, args.resume, args.override)

        def prepare(processes: int):
            prepared = prepare_training(cfg, processes, resume_from)
            if args.rescue_dir:
                check_work_dir(args.rescue_dir, flag="--rescue-dir")
            return prepared

        def work(prepared) -> None:
            train(cfg, resume_from, notes, prepared, args.strict_data, args.rescue_dir)

        return command(prepare, work, args.gpus, args.timeout, cfg.work_dir)
