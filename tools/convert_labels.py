#!/usr/bin/env python
"""Write label maps with other numbers: tools/convert_labels.py {values,camvid} (see --help)."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where it is not installed

from semaim.cli.convert_labels import main
from semaim.errors import run

if __name__ == "__main__":
    sys.exit(run(main))
