#!/usr/bin/env python
"""Predict images and videos with a trained model: tools/predict.py CONFIG FILE IMAGES... --out DIR (see --help)."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where it is not installed

from semaim.cli.predict import main
from semaim.errors import run

if __name__ == "__main__":
    sys.exit(run(main))
