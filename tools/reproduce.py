#!/usr/bin/env python
"""From images to the results table: tools/reproduce.py --scale quick --work-dir work_dirs/quick (see --help)."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where it is not installed

from semaim.cli.reproduce import main
from semaim.errors import run

if __name__ == "__main__":
    sys.exit(run(main))
