"""Check the label maps of a segmentation data set before a training uses them.

`verify_ade20k` reads everything, images included, and returns a `Report`. `count_values` decodes only the label maps,
for the start of a training. The rules for their values are in label_rules.py. Nothing is written.
"""

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from semaim.data.decoding import MOST_PIXELS
from semaim.data.findings import SPLITS, Note, Report, StrPath, image_size, parallel, shortened, size_text
from semaim.data.label_rules import Labels, errors, limits, warnings
from semaim.data.shards import printable
from semaim.errors import UserError

LABEL_MODES = ("L", "P", "I", "I;16", "I;16B")  # Pillow's modes of PNGs with one channel of 8 or 16 bits
BROKEN_IMAGE = "broken image"
ONE_CHANNEL = ", which Pillow's convert('L') makes one channel"
#: What to do about other modes.
REMEDIES = {
    "1": f"{ONE_CHANNEL} of 0 and 255",
    "LA": ONE_CHANNEL,
    "RGB": f"{ONE_CHANNEL} only if red, green and blue are the class number; colours have to be replaced by numbers",
}


def _check_pair(pair: tuple[Path, Path], whole: bool = True) -> tuple[Note | None, dict[int, int]]:
    """A problem of an image (its header only, without `whole`) and its label map, or None; and the pixels per value."""
    image, label = pair
    try:
        size = image_size(image, whole)
    except Exception as error:  # Pillow raises many types for the many ways a file can be broken
        return (BROKEN_IMAGE, f"{printable(image.name)}: {_reason(error)}"), {}
    if size[0] * size[1] > MOST_PIXELS:
        return (BROKEN_IMAGE, f"{printable(image.name)}: {size_text(size)}, more than {MOST_PIXELS:,} pixels"), {}
    name = printable(label.name)
    try:
        with Image.open(label) as file:  # the header; nothing of another size or mode is decoded
            mode, found = file.mode, file.size
            if mode not in LABEL_MODES:
                return (
                    "label map that is not one channel of 8 or 16 bits",
                    f"{name}: mode {mode}{REMEDIES.get(mode, '')}",
                ), {}
            if found != size:
                text = f"{name}: {size_text(found)}, its image {size_text(size)}"
                return ("label map and image differ in size", text), {}
            values = np.asarray(file)
        with Image.open(label) as file:
            file.verify()  # a PNG's checksums, which decoding leaves out
    except Exception as error:
        return ("broken label map", f"{name}: {_reason(error)}"), {}
    if values.dtype == np.uint8:  # faster than sorting them
        counts = np.bincount(values.ravel())
        return None, {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    kept, counts = np.unique(values, return_counts=True)
    return None, dict(zip(kept.tolist(), counts.tolist(), strict=True))


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def count_values(pairs: list[tuple[str, str]]) -> dict[str, dict[int, int]]:
    """The pixels of each value in every label map, by its file; `UserError` if one cannot be trained on.

    Args:
        pairs: (image, label map) files.
    """
    return _count_values(tuple((*pair, *map(_state, pair)) for pair in pairs))


def _state(path: str) -> tuple[int, int]:
    """The modification time and size of a file; zeros if it does not exist."""
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


@lru_cache(maxsize=2)  # both splits: a run of one process needs them before it starts, and again for its log
def _count_values(files: tuple[tuple, ...]) -> dict[str, dict[int, int]]:
    def count(pair: tuple) -> tuple[str | None, dict[int, int]]:
        image, label = map(Path, pair[:2])
        if not label.is_file():
            return f"{image} has no label map {label}", {}
        note, found = _check_pair((image, label), whole=False)
        folder = (image if note and note[0] == BROKEN_IMAGE else label).parent
        return f"{folder}: {note[0]}: {note[1]}" if note else None, found

    results = parallel(count, list(files), min(32, os.cpu_count() or 1), True, "label maps")
    if faults := [fault for fault, _ in results if fault]:
        more = f"{len(faults)} of {len(files)} pairs are wrong; `semaim verify data`, or ade20k, lists them"
        raise UserError(f"{faults[0]} ({more})")
    return {label: found for (_, label, *_), (_, found) in zip(files, results, strict=True)}


def verify_ade20k(
    root: StrPath,
    classes: int = 150,
    reduce_zero_label: bool = True,
    workers: int = 4,
    progress: bool = False,
    most_ignored: float | None = None,
) -> Report:
    """Check every pair of images/{training,validation}/NAME.jpg and annotations/{training,validation}/NAME.png.

    Args:
        root: the folder that holds images/ and annotations/.
        classes: their number, without unlabelled.
        reduce_zero_label: whether 0 means unlabelled and classes count from 1, as in ADE20K, or classes count from 0.
        workers: threads.
        progress: show a bar if the standard error is a terminal.
        most_ignored: largest share of a split's pixels that may be unlabelled, None for no limit.

    `UserError` if there is nothing to check.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"no such folder: {root}")
    report = Report(str(root))
    pairs_found, trained = 0, None
    for split in SPLITS.values():
        images, labels = root / "images" / split, root / "annotations" / split
        if not images.is_dir() and not labels.is_dir():
            continue
        for folder in (images, labels):
            if not folder.is_dir():
                raise UserError(f"no such folder: {folder} (ADE20K's layout: images/{split} and annotations/{split})")
        # Without the hidden files that some systems add.
        pictures, maps = {p.stem for p in images.glob("[!.]*.jpg")}, {p.stem for p in labels.glob("[!.]*.png")}
        for stem in sorted(pictures - maps):
            report.problem("image without label map", f"{split}/{stem}.jpg")
        for stem in sorted(maps - pictures):
            report.problem("label map without image", f"{split}/{stem}.png")
        stems = sorted(pictures & maps)
        pairs_found += len(stems)
        pairs = [(images / f"{stem}.jpg", labels / f"{stem}.png") for stem in stems]
        counts = {}
        for stem, (note, found) in zip(stems, parallel(_check_pair, pairs, workers, progress, split), strict=True):
            if note:
                report.problem(note[0], f"{split}/{note[1]}")
            else:
                counts[f"{split}/{stem}.png"] = found
        report.summary.append(f"{split}: {len(stems)} pairs of image and label map")
        if counts:
            found = Labels(split, counts, ("",) * classes, split == SPLITS["train"], reduce_zero_label)
            _judge(report, found, trained, most_ignored)
            trained = found
    if not pairs_found:
        raise UserError(f"no pairs in {root}: it needs images/training/NAME.jpg and annotations/training/NAME.png")
    return report


def verify_pairs(
    report: Report,
    labels: Callable[[dict[str, dict[int, int]]], Labels | None],
    pairs: list[tuple[Path, Path]],
    trained: Labels | None = None,
    workers: int = 4,
    progress: bool = False,
) -> Labels | None:
    """Add to a report what is found in pairs of image and label map; returns the values of their label maps.

    Args:
        report: gets the problems.
        labels: from label map -> pixels of each value to what they mean; None if that is not known.
        pairs: (image, label map).
        trained: the values of the training split, for those of the validation split.
        workers, progress: as for `verify_ade20k`.
    """
    counts = {}
    for (_, label), (note, found) in zip(pairs, parallel(_check_pair, pairs, workers, progress, "pairs"), strict=True):
        if note:
            report.problem(*note)
        else:
            counts[str(label)] = found
    read = labels(counts) if counts else None
    if read is not None:
        _judge(report, read, trained, None)
    return read


def _judge(report: Report, labels: Labels, trained: Labels | None, most_ignored: float | None) -> None:
    """Add the values of a split and their problems to the report, naming every map with a value beyond the classes."""
    report.summary += str(labels).split("\n")
    beyond = "value beyond the classes"
    for kind, text in errors(labels, most_ignored):
        if kind != beyond:
            report.problem(kind, text)
            continue
        for name, found in labels.counts.items():
            if over := labels.beyond(found):
                report.problem(kind, f"{name}: {shortened(list(map(str, over)))}; {limits(labels, over[0])}")
    for kind, text in warnings(labels, trained):
        report.warning(kind, text)
