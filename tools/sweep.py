#!/usr/bin/env python
"""Search learning rate and layer decay: tools/sweep.py CONFIG --lr 1e-4 2e-4 --layer-decay 0.65 0.75 (see --help)."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where it is not installed

from semaim.cli.sweep import main
from semaim.errors import run

if __name__ == "__main__":
    sys.exit(run(main))
