"""Segmentations of COCO's files: whether pycocotools can decode them as mmdet asks it to.

pycocotools checks nothing: it returns uninitialised memory for run lengths that do not fill the image, and reads a
polygon of four numbers as a box. mmdet leaves out polygons of fewer than three points or of an odd number of
coordinates, and raises a KeyError for an annotation without a segmentation.
"""

import reprlib
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

CHUNK = 20_000  #: annotations that are checked together
FEWEST = 6  #: numbers of a polygon of three points
NUMBERS = frozenset((int, float))  #: types of numbers in JSON; true and false are none

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong = 3, 40, 40


def cannot_decode(shape: Any, size: tuple[int, int]) -> str | None:
    """Why a segmentation cannot be decoded; None if it can.

    Args:
        shape: polygons, or a dict of run lengths.
        size: width, height of the image.
    """
    if not shape:
        return "has no segmentation"
    if isinstance(shape, dict):
        fault = damaged_runs(shape, size)
        return f"has damaged run lengths: {fault}" if fault else None
    if not isinstance(shape, list):
        return "has a segmentation that is neither polygons nor run lengths"
    most = float(max(size))
    for polygon in shape:
        if not isinstance(polygon, list) or not all(type(number) in NUMBERS for number in polygon):
            return "has a polygon that is no list of numbers"
        if not all(-most <= number <= 2 * most for number in polygon):  # NaN neither
            return f"has a polygon far outside its image of {size[0]} x {size[1]} pixels"
    if not any(len(polygon) >= FEWEST and len(polygon) % 2 == 0 for polygon in shape):
        return "has no polygon of three or more points"
    if len(shape[0]) < 5:
        return f"begins with a polygon of {len(shape[0])} numbers, which pycocotools does not read as one"
    return None


def damaged_runs(rle: dict, size: tuple[int, int]) -> str | None:
    """What is wrong with run lengths, compressed or not; None if they fill the image of this width and height."""
    width, height = size
    if rle.get("size") != [height, width]:
        return f"their size is {cut(rle.get('size'))}, the image has height, width {[height, width]}"
    runs = runs_of(rle.get("counts"))
    if not len(runs) or (runs < 0).any() or (runs > width * height).any() or runs.sum() != width * height:
        return f"they do not add up to {width} x {height} pixels"
    return None


def runs_of(counts: Any) -> np.ndarray:
    """Run lengths of uncompressed or compressed counts, int64; empty if they are damaged."""
    none = np.empty(0, np.int64)
    if isinstance(counts, list):
        whole = all(type(run) is int and -1 < run < 1 << 31 for run in counts)
        return np.array(counts, np.int64) if whole else none
    if not isinstance(counts, str) or not counts.isascii():
        return none
    # Five bits per character, the lowest first; the sixth says that more follow. From the fourth number on, each is the
    # difference to the last but one.
    codes = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    last = (codes & 32) == 0
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or not last[-1]:
        return none
    starts = np.flatnonzero(np.concatenate([[True], last[:-1]]))
    lengths = np.diff(np.append(starts, len(codes)))
    if lengths.max() > 7:  # more than 35 bits
        return none
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & 31) << (5 * place), starts)
    runs -= np.where(codes[starts + lengths - 1] & 16, np.int64(1) << (5 * lengths), 0)
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs


def undecodable(shapes: Sequence[Any], sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[int, str]]:
    """Places of the segmentations that cannot be decoded, and why, as `cannot_decode` for each, but quickly.

    Polygons of many annotations are checked together: those of COCO's 860,000 in seconds.
    """
    for start in range(0, len(shapes), CHUNK):
        part, limits = shapes[start : start + CHUNK], sizes[start : start + CHUNK]
        lists = [(shape, size) for shape, size in zip(part, limits, strict=True) if isinstance(shape, list)]
        clean = _all_polygons([shape for shape, _ in lists], [max(size) for _, size in lists])
        for place, (shape, size) in enumerate(zip(part, limits, strict=True), start):
            if not (clean and isinstance(shape, list)) and (fault := cannot_decode(shape, size)):
                yield place, fault


def _all_polygons(shapes: list[list], sides: list[int]) -> bool:
    """Whether all of these lists hold polygons of three or more points near images of these longer sides."""
    polygons = list(chain.from_iterable(shapes))
    if not all(shapes) or set(map(type, polygons)) - {list}:
        return False
    lengths = np.fromiter(map(len, polygons), np.int64, len(polygons))
    if (lengths < FEWEST).any() or (lengths % 2).any() or set(map(type, chain.from_iterable(polygons))) - NUMBERS:
        return False
    try:
        numbers = np.fromiter(chain.from_iterable(polygons), np.float64, lengths.sum())
    except OverflowError:  # an integer beyond the largest float
        return False
    most = np.repeat(np.repeat(sides, list(map(len, shapes))), lengths)
    return bool(((numbers >= -most) & (numbers <= 2 * most)).all())


def cut(value: Any) -> str:
    """A value of a file for a message: in one line, and not all of a long or nested one."""
    return _SHORT.repr(value)
