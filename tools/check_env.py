#!/usr/bin/env python3
"""Say what is installed and what works on this machine, with nothing but Python: tools/check_env.py (see --help)."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # this package may not be installed
    from semaim.cli.check_env import main

    sys.exit(main())
