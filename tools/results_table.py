#!/usr/bin/env python
"""Our results next to published ones: tools/results_table.py work_dirs/ --format md (see --help)."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where it is not installed

from semaim.cli.results_table import main
from semaim.errors import run

if __name__ == "__main__":
    sys.exit(run(main))
