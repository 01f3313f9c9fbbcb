"""Finds what is wrong with the label maps of a segmentation data set before a training meets them.

`verify_ade20k` reads everything, the images too, and returns a `Report`. `check_pairs` decodes the label maps only: it
is for the start of a training. Nothing is ever written.
"""

import os
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from semaim.data.findings import SPLITS, Note, Report, StrPath, image_size, parallel, shortened, size_words
from semaim.errors import UserError

IGNORED = 255
LABEL_MODES = ("L", "P", "I", "I;16", "I;16B")  # Pillow's names of one channel of 8 or 16 bits in a PNG


def _check_pair(pair: tuple[Path, Path], whole: bool = True) -> tuple[Note | None, dict[int, int]]:
    """What is wrong with an image, of which all or only the head is read, and its label map; the pixels per value."""
    image, label = pair
    try:
        size = image_size(image, whole)
    except Exception as error:
        return ("broken image", f"{image.name}: {error}"), {}
    try:
        with Image.open(label) as file:
            mode, values = file.mode, np.asarray(file)
    except Exception as error:
        return ("broken label map", f"{label.name}: {error}"), {}
    if mode not in LABEL_MODES:
        return ("label map that is not one channel of 8 or 16 bits", f"{label.name}: mode {mode}"), {}
    if values.shape != size[::-1]:
        text = f"{label.name}: {size_words(values.shape[::-1])}, its image {size_words(size)}"
        return ("label map and image differ in size", text), {}
    counts = np.bincount(values.ravel())
    return None, {int(value): int(counts[value]) for value in np.flatnonzero(counts)}


def check_pairs(pairs: list[tuple[StrPath, StrPath]], classes: int, reduce_zero_label: bool) -> None:
    """Raise `UserError` for what would break a training, or silently spoil it: every label map is decoded.

    Args:
        pairs: (image, label map) files.
        classes, reduce_zero_label: of `verify_ade20k`.
    """
    last = classes if reduce_zero_label else classes - 1

    def fault(pair: tuple[StrPath, StrPath]) -> str | None:
        image, label = map(Path, pair)
        if not label.is_file():
            return f"{image} has no label map {label}"
        note, found = _check_pair((image, label), whole=False)
        if note:
            return f"{label.parent}: {note[0]}: {note[1]}"
        beyond = [value for value in found if value > last and value != IGNORED]
        if beyond:
            text = f"{label} holds the value {beyond[0]}; of {classes} classes, with reduce_zero_label="
            return f"{text}{reduce_zero_label}, the largest is {last}"
        return None

    faults = [text for text in parallel(fault, pairs, min(32, os.cpu_count() or 1), True, "label maps") if text]
    if faults:
        more = f"{len(faults)} of {len(pairs)} pairs are wrong; tools/verify_dataset.py ade20k lists them"
        raise UserError(f"{faults[0]} ({more})")


def verify_ade20k(
    root: StrPath, classes: int = 150, reduce_zero_label: bool = True, workers: int = 4, progress: bool = False
) -> Report:
    """Look at every pair of images/{training,validation}/NAME.jpg and annotations/{training,validation}/NAME.png.

    Args:
        root: the folder that holds images/ and annotations/.
        classes: how many there are, unlabelled not counted.
        reduce_zero_label: whether 0 means unlabelled and classes count from 1, as in ADE20K, or classes count from 0.
        workers: threads.
        progress: show a bar, where the standard error is a terminal.

    `UserError` where there is nothing to look at.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"no such folder: {root}")
    report = Report(str(root))
    pixels: Counter = Counter()
    pairs_found, last = 0, classes if reduce_zero_label else classes - 1
    for split in SPLITS.values():
        images, labels = root / "images" / split, root / "annotations" / split
        if not images.is_dir() and not labels.is_dir():
            continue
        for folder in (images, labels):
            if not folder.is_dir():
                raise UserError(f"no such folder: {folder} (ADE20K's layout: images/{split} and annotations/{split})")
        # Not the hidden files that some systems put beside each.
        pictures, maps = {p.stem for p in images.glob("[!.]*.jpg")}, {p.stem for p in labels.glob("[!.]*.png")}
        for stem in sorted(pictures - maps):
            report.problem("image without label map", f"{split}/{stem}.jpg")
        for stem in sorted(maps - pictures):
            report.problem("label map without image", f"{split}/{stem}.png")
        stems = sorted(pictures & maps)
        pairs_found += len(stems)
        pairs = [(images / f"{stem}.jpg", labels / f"{stem}.png") for stem in stems]
        results = parallel(_check_pair, pairs, workers, progress, split)
        for stem, (note, found) in zip(stems, results, strict=True):
            if note:
                report.problem(note[0], f"{split}/{note[1]}")
                continue
            pixels.update(found)
            beyond = [value for value in found if value > last and value != IGNORED]
            if beyond:
                report.problem(f"label value over {last}", f"{split}/{stem}.png: {shortened(list(map(str, beyond)))}")
            elif not any(value != IGNORED and (value or not reduce_zero_label) for value in found):
                report.warning("nothing labelled", f"{split}/{stem}.png")
        report.summary.append(f"{split}: {len(stems)} pairs of image and label map")
    if not pairs_found:
        raise UserError(f"no pairs in {root}: it needs images/training/NAME.jpg and annotations/training/NAME.png")
    _look_at_values(report, pixels, classes, reduce_zero_label)
    return report


def _look_at_values(report: Report, pixels: Counter, classes: int, reduce_zero_label: bool) -> None:
    values = sorted(value for value in pixels if value != IGNORED)
    if not values:
        return
    first = int(reduce_zero_label)
    present = sum(first <= value < classes + first for value in values)
    share = (pixels[IGNORED] + pixels[0] * first) / sum(pixels.values())
    report.summary.append(f"{present} of {classes} classes occur, {share:.1%} of the pixels are unlabelled")
    kind = "reduce_zero_label looks wrong"
    if reduce_zero_label and values[-1] == classes - 1:
        zero = "0 occurs" if values[0] == 0 else "0 never occurs"
        text = f"it is on, but the largest value is {classes - 1} and {zero}"
        report.warning(kind, f"{text}: do the classes count from 0, or are there only {classes - 1}?")
    elif not reduce_zero_label and values[-1] == classes:
        report.warning(kind, f"it is off, but values reach {classes}: do the classes count from 1?")
