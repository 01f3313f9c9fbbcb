#!/usr/bin/env python
"""Inspect checkpoints, write them in other dialects: tools/checkpoint.py {inspect,convert,export} (see --help)."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where it is not installed

from semaim.cli.checkpoint import main
from semaim.errors import run

if __name__ == "__main__":
    sys.exit(run(main))
