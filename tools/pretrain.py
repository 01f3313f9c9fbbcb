#!/usr/bin/env python
"""Pretrain SemAIM: tools/pretrain.py [CONFIG] [GPUS] --data-root DIR (see --help)."""

import argparse
import os
import sys
from pathlib import Path

from mmengine.config import DictAction

from semaim.engine.config import load_config
from semaim.engine.launcher import check_processes, choose_checkpoint, launched, plan_run, pretrain, spawn
from semaim.errors import run

DEFAULT = "semaim/configs/pretrain/semaim_vit_base_800e.py"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Pretrain a plain ViT without labels by predicting patches, the semantic ones first.",
        epilog="Several nodes: set NNODES, NODE_RANK, MASTER_ADDR and PORT on each, or start it with torchrun.",
    )
    parser.add_argument("config", nargs="?", default=DEFAULT, help="config file (default: %(default)s)")
    parser.add_argument("gpus", nargs="?", type=int, help="GPUs of this machine, or CPU processes where it has none")
    parser.add_argument("--data-root", metavar="DIR", help="folder of images, of class folders, or a list file")
    parser.add_argument("--work-dir", metavar="DIR", help="where to write (default: work_dirs/CONFIG)")
    parser.add_argument(
        "--resume", nargs="?", const="auto", metavar="FILE", help="go on from FILE or the work folder's newest"
    )
    parser.add_argument(
        "--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="change keys of the config"
    )
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    if args.data_root:
        cfg.dataset.root = args.data_root
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("work_dirs") / Path(args.config).stem)
    if launched():
        pretrain(cfg, choose_checkpoint(cfg, args.resume))
        return 0
    processes = check_processes(args.gpus)
    plan_run(cfg, processes * int(os.environ.get("NNODES", 1)))
    checkpoint = choose_checkpoint(cfg, args.resume)
    if processes > 1 or "NNODES" in os.environ:
        return spawn(sys.argv, processes)
    pretrain(cfg, checkpoint)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
