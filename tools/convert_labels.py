#!/usr/bin/env python
"""Write label maps with other numbers: tools/convert_labels.py {values,camvid} (see --help)."""

import sys

from semaim.cli.convert_labels import main
from semaim.errors import run

if __name__ == "__main__":
    sys.exit(run(main))
