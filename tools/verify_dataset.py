#!/usr/bin/env python
"""Find what is wrong with a data set: tools/verify_dataset.py {coco,ade20k} ROOT (see --help)."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where it is not installed

from semaim.cli.verify_dataset import main
from semaim.errors import run

if __name__ == "__main__":
    sys.exit(run(main))
