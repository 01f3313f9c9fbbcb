"""The scalars that a run's training and validation have logged to its work folder."""

import json
from collections.abc import Mapping
from pathlib import Path

from semaim.errors import UserError
from semaim.reading import read_text, strange

COUNTS = ("iter", "epoch", "step")  #: whole numbers in a line


def read_lines(work_dir: str | Path) -> list[dict]:
    """All logged scalars of a run in order of time; resumed parts replace what they repeat.

    Training lines have `iter`. Validation lines get the `iter` of the training line before them, and `validation=True`.
    An incomplete last line of a running training is left out, as any line that is none of ours.

    Raises:
        UserError: a file cannot be read.
    """
    kept: list[dict] = []
    for file in sorted(Path(work_dir).glob("*/vis_data/scalars.json")):
        lines, last = [], 0
        for text in read_text(file).splitlines():
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if not isinstance(line, dict) or not sound(line):
                continue
            trained = "loss" in line and "iter" in line
            last = line["iter"] if trained else last
            lines.append(line if trained else {**line, "iter": last, "validation": True})
        if lines:
            start = lines[0]["iter"]
            kept = [line for line in kept if line["iter"] < start or not start]
        kept += lines
    return kept


def sound(line: Mapping) -> bool:
    """Whether a logged line counts in whole numbers, and has none that cannot be calculated with."""
    return not strange(line) and all(type(line[name]) is int and line[name] >= 0 for name in COUNTS if name in line)


def read_scalars(work_dir: str | Path) -> list[dict]:
    """The logged scalars of a run's training, by rising iteration; `UserError` if nothing was logged."""
    lines = read_lines(work_dir)
    if not lines and not list(Path(work_dir).glob("*/vis_data/scalars.json")):
        raise UserError(f"no logged scalars in {work_dir}: name the work folder of a run")
    by_iteration = {line["iter"]: line for line in lines if "validation" not in line}
    return [by_iteration[i] for i in sorted(by_iteration)]
