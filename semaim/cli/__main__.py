"""`python -m semaim.cli COMMAND ...`, for when the command `semaim` is not on the path."""

import sys

from semaim.cli import main

if __name__ == "__main__":
    sys.exit(main())
