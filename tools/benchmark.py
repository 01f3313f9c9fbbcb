#!/usr/bin/env python
"""Speed and memory compared with a baseline: tools/benchmark.py pretrain, and more (see --help)."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where it is not installed

from semaim.cli.benchmark import main
from semaim.errors import run

if __name__ == "__main__":
    sys.exit(run(main))
