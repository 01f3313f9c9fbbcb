#!/usr/bin/env python
"""Compare the model with recorded results of the reference implementations: tools/check_parity.py FOLDER."""

import sys

from semaim.cli.check_parity import main
from semaim.errors import run

if __name__ == "__main__":
    sys.exit(run(main))
