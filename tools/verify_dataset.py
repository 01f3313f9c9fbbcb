#!/usr/bin/env python
"""Find what is wrong with a data set: tools/verify_dataset.py {coco,ade20k} ROOT (see --help)."""

import sys

from semaim.cli.verify_dataset import main
from semaim.errors import run

if __name__ == "__main__":
    sys.exit(run(main))
