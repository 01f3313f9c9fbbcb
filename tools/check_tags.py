#!/usr/bin/env python
"""Whether every consumer loads or refuses timm's plain ViTs correctly: tools/check_tags.py (see --help)."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where it is not installed

from semaim.cli.check_tags import main
from semaim.errors import run

if __name__ == "__main__":
    sys.exit(run(main))
