#!/usr/bin/env python
"""Measure a checkpoint: tools/test.py CONFIG FILE --data-root DIR (see --help)."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where it is not installed

from semaim.cli.test import main
from semaim.errors import run

if __name__ == "__main__":
    sys.exit(run(main))
