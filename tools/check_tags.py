#!/usr/bin/env python
"""Every plain ViT that timm has weights of: right or refused, for every consumer: tools/check_tags.py (see --help)."""

import sys

from semaim.cli.check_tags import main
from semaim.errors import run

if __name__ == "__main__":
    sys.exit(run(main))
