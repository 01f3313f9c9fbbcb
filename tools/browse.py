#!/usr/bin/env python
"""Look at training images after augmentation: tools/browse.py CONFIG --out FILE.png (see --help)."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where it is not installed

from semaim.cli.browse import main
from semaim.errors import run

if __name__ == "__main__":
    sys.exit(run(main))
