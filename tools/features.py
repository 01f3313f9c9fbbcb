#!/usr/bin/env python
"""Features of images by any encoder, in a file: tools/features.py SOURCE IMAGES... --out FILE.npy (see --help)."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where it is not installed

from semaim.cli.features import main
from semaim.errors import run

if __name__ == "__main__":
    sys.exit(run(main))
