"""Counts of the attacks in this folder, one JSON file for each, for docs/reliability.md."""

import json
import os
import platform
from pathlib import Path

from commands import ROOT

FOLDER = Path(os.environ.get("SEMAIM_FAULTS", ROOT / "work_dirs" / "faults"))


def record(name: str, **counts: object) -> None:
    """Print what an attack counted, and write it to FOLDER/NAME.json."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"attack": name, **counts, "python": platform.python_version()}, indent=2, default=str)
    (FOLDER / f"{name}.json").write_text(text + "\n")
    print(text)
