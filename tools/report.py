#!/usr/bin/env python
"""One HTML file about runs: tools/report.py work_dirs/ --out report.html (see --help)."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where it is not installed

from semaim.cli.report import main
from semaim.errors import run

if __name__ == "__main__":
    sys.exit(run(main))
