#!/usr/bin/env python
"""Compare the model with recorded results of the reference implementations: tools/check_parity.py FOLDER."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where it is not installed

from semaim.cli.check_parity import main
from semaim.errors import run

if __name__ == "__main__":
    sys.exit(run(main))
