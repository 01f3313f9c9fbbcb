#!/usr/bin/env python
"""Train a stage: tools/train.py CONFIG --pretrained FILE --data-root DIR (see --help)."""

import sys

from semaim.cli.train import main
from semaim.errors import run

if __name__ == "__main__":
    sys.exit(run(main))
