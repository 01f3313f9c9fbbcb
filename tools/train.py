#!/usr/bin/env python
"""Train a stage: tools/train.py CONFIG --pretrained FILE --data-root DIR (see --help)."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where it is not installed

from semaim.cli.train import main
from semaim.errors import run

if __name__ == "__main__":
    sys.exit(run(main))
