#!/usr/bin/env python
"""Features of images by any encoder, in a file: tools/features.py SOURCE IMAGES... --out FILE.npy (see --help)."""

import sys

from semaim.cli.features import main
from semaim.errors import run

if __name__ == "__main__":
    sys.exit(run(main))
