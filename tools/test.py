#!/usr/bin/env python
"""Measure a checkpoint: tools/test.py CONFIG FILE --data-root DIR (see --help)."""

import sys

from semaim.cli.test import main
from semaim.errors import run

if __name__ == "__main__":
    sys.exit(run(main))
