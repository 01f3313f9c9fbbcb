"""Check data of one's own, images included, and describe them: `semaim verify data`."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from semaim.data.described import (
    Description,
    as_yaml,
    classes_and_values,
    ignored_values,
    renumbered,
    unclear,
)
from semaim.data.describing import SPLITS, describe, paired
from semaim.data.findings import Report, shortened
from semaim.data.label_maps import verify_pairs
from semaim.data.label_rules import Labels
from semaim.data.labelled import is_flat
from semaim.data.layouts import NotFound
from semaim.data.pairs import part_of
from semaim.data.verify import verify_coco
from semaim.errors import UserError

Counts = dict[str, dict[int, int]]  # label map -> value -> pixels


def verify_own(
    root: str | None, file: str | None = None, named: Sequence[str] | None = None, workers: int = 4
) -> tuple[str, list[Report]]:
    """The YAML of --data that describes the data, and what was found in each split.

    Args:
        root: folder of the data; None for the file's.
        file: of --data; None for what is found in the root.
        named: names of the classes of label maps; None for the file's, or for none, where their values are listed.
        workers: threads.

    `UserError` if there is no layout to be seen, or more than one.
    """
    try:
        given = describe(None, root, file, named)
    except NotFound:
        if root and (is_flat(root) or is_flat(os.path.join(root, "train"))):
            raise UserError(f"{root} has class folders: `semaim verify images {root}` reads all their images") from None
        raise
    if "annotations" in given["train"]:
        places = [[os.path.join(given["root"], given[name][key]) for key in ("annotations", "images")]
                  for name in SPLITS if name in given]  # fmt: skip
        return as_yaml(given), [verify_coco(ann, images, workers, True, any_id=True) for ann, images in places]
    reports: list[Report] = []
    values: set[int] = set()
    trained = None
    for name in SPLITS:
        if name not in given:
            continue
        pairs, bare = paired(given, name)
        report = Report(os.path.join(given["root"], given[name]["images"]))
        report.summary.append(f"{len(pairs)} pairs of image and label map")
        if "val" not in given:
            report.summary.append(f"{_held_out(given, pairs)} of them held out for validation")
        if bare:
            report.warning("image without label map, left out", shortened(bare, 3))
        counts: Counts = {}
        meaning = _meaning(given, name, counts, report)
        trained = verify_pairs(report, meaning, [(Path(a), Path(b)) for a, b in pairs], trained, workers, True)
        values |= {value for found in counts.values() for value in found}
        reports.append(report)
    if "classes" not in given:
        given["classes"] = {value: f"NAME OF {value}" for value in sorted(values - {255})}
        if values == {0, 255}:  # one class against the background
            given["classes"] = ["NAME OF 255"]
    return as_yaml(given), reports


def _held_out(given: Description, pairs: Sequence[tuple[str, str]]) -> int:
    """The number of pairs that are held out."""
    images = os.path.join(given["root"], given["train"]["images"])
    return len(part_of([os.path.relpath(image, images) for image, _ in pairs], "val", given["held_out"]))


def _meaning(given: Description, name: str, counts: Counts, report: Report):
    """For `verify_pairs`: what the values mean; they are added to `counts`, and to the report if it is not certain."""

    def read(found: Counts) -> Labels | None:
        counts.update(found)
        pixels: dict[int, int] = {}
        for one in found.values():
            for value, number in one.items():
                pixels[value] = pixels.get(value, 0) + number
        if "classes" not in given:
            report.summary.append(f"values of the label maps: {shares(pixels)}")
            return None
        names, values = classes_and_values(given)
        if text := unclear(values, ignored_values(given), names, pixels):
            report.problem("values that are no class", text)
            return None
        return Labels(name, found, tuple(names), name == "train", False, renumbered(values, ignored_values(given)))

    return read


def shares(pixels: Mapping[int, int]) -> str:
    """Values and their shares of the pixels."""
    total = sum(pixels.values())
    return ", ".join(f"{value} {pixels[value] / total:.2%}" for value in sorted(pixels))
