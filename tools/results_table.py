#!/usr/bin/env python
"""Our results next to published ones: tools/results_table.py work_dirs/ --format md (see --help)."""

import sys

from semaim.cli.results_table import main
from semaim.errors import run

if __name__ == "__main__":
    sys.exit(run(main))
