"""Pretrain: semaim pretrain [CONFIG [GPUS]] ..., like tools/pretrain.sh."""

import sys

from semaim.cli import train

CONFIG = "semaim/configs/pretrain/semaim_vit_base_800e.py"  #: the default


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        parser = train.make_parser(prog)
        parser.usage = "%(prog)s [CONFIG [GPUS]] [flags]"
        parser.description = f"Pretrain without labels. CONFIG defaults to {CONFIG}, and GPUS to all. Without a"
        parser.description += " GPU, GPUS is the number of CPU processes."
        parser.print_help()
        return 0
    # Arguments before the first flag.
    config = words.pop(0) if words and not words[0].startswith("-") else CONFIG
    gpus = words.pop(0) if words and not words[0].startswith("-") else "all"
    return train.main([config, "--gpus", gpus, *words], prog)
