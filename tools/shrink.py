#!/usr/bin/env python
"""A copy of a data set with smaller images: tools/shrink.py SRC DST --side 384 (see --help)."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where it is not installed

from semaim.cli.shrink import main
from semaim.errors import run

if __name__ == "__main__":
    sys.exit(run(main))
