#!/usr/bin/env python
"""Pictures of a run: tools/visualize.py order CHECKPOINT IMAGES... --out FILE.png, and more kinds (see --help)."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where it is not installed

from semaim.cli.visualize import main
from semaim.errors import run

if __name__ == "__main__":
    sys.exit(run(main))
