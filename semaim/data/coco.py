"""COCO's annotation files: reading them, and refusing before a training what would end it later.

`check_coco_file` holds what mmdet's CocoDataset, LoadAnnotations and CocoMetric read of a file to what they can take.
"""

import copy
import gc
import json
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from semaim.data.categories import Categories
from semaim.data.coco_masks import NUMBERS, cut, undecodable
from semaim.data.decoding import MOST_PIXELS
from semaim.data.findings import StrPath, image_size, parallel, size_text
from semaim.data.shards import printable
from semaim.errors import UserError
from semaim.reading import once

SLACK = 1.0  #: pixels that a box or polygon may extend over the image's edge: files round differently
LARGEST = 2**53  #: of an id: COCO's metric keeps ids as doubles


@contextmanager
def _uncollected() -> Iterator[None]:
    """Turn garbage collection off: each pass would visit millions of records and free none."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@_uncollected()
def read_json(path: StrPath) -> Any:
    """The content of a JSON file, not to be changed; `UserError` if it is not JSON, FileNotFoundError if absent."""
    try:
        return once(path, lambda it: json.loads(Path(it).read_bytes()), "json")
    except FileNotFoundError:
        raise
    except RecursionError:
        raise UserError(f"{path} is no readable JSON: its lists are nested too deeply") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is no readable JSON: {error}") from None


def read_coco(ann: StrPath, images: StrPath) -> dict:
    """The annotation file; `UserError` if it or the folder does not exist, or there is nothing to train on."""
    if not Path(ann).is_file():
        raise UserError(f"no such file: {ann} (COCO's layout: annotations/instances_train2017.json and train2017/)")
    if not Path(images).is_dir():
        raise UserError(f"no such folder: {images} (the images of {ann})")
    document = read_json(ann)
    for key in ("images", "annotations", "categories"):
        records = document.get(key) if isinstance(document, dict) else None
        if not isinstance(records, list):
            raise UserError(f"{ann} is no COCO annotation file: it has no list '{key}'")
        if not records:
            raise UserError(f"{ann} has no {key}: its list '{key}' is empty")
    return document


def absent_files(images: StrPath, names: Iterable[str]) -> Iterator[str]:
    """The names without a file, by one listing of each folder: looking up every file is slow on a network disk."""
    listings: dict[str, set[str]] = {}
    for name in names:
        folder, base = os.path.split(name)
        if folder not in listings:
            path = os.path.join(images, folder)
            listings[folder] = {entry.name for entry in os.scandir(path)} if os.path.isdir(path) else set()
        if base not in listings[folder]:
            yield name


def outside(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Which boxes (N, 4), x, y, width, height, extend over their images (N, 2), width, height; NaN is outside."""
    corner = boxes[:, :2]
    return ~((corner >= -SLACK) & (corner + boxes[:, 2:] <= sizes + SLACK)).all(axis=1)


def check_coco_file(ann: StrPath, images: StrPath, masks: bool = False, measured: bool = False) -> Categories:
    """The categories of an annotation file; `UserError` for what would break a training on it.

    COCO's 118,000 images and 860,000 annotations take half a minute; of an image only the header is read.

    Args:
        ann: COCO's annotation file.
        images: folder that its file names are relative to.
        masks: whether masks are learned or measured; if so, every annotation needs one that can be decoded.
        measured: whether predictions are compared with it; if so, no annotation may have the id 0.
    """
    kind = f"checked with {images}, masks {masks}, measured {measured}"
    return once(ann, lambda it: _check(it, images, masks, measured), kind)


@_uncollected()
def _check(ann: StrPath, images: StrPath, masks: bool, measured: bool) -> Categories:
    document = read_coco(ann, images)
    hint = f"tools/verify_dataset.py coco --ann {ann} --images {images} lists all problems"

    def refuse(text: str, others: int = 0) -> UserError:
        return UserError(f"{ann}: {text}{f' ({others} such)' if others > 1 else ''}; {hint}")

    def column(key: str, name: str, right: Callable[[Any], bool], what: str) -> list:
        """A key's values in all records of a list."""
        with suppress(KeyError, TypeError, IndexError):
            values = [record[name] for record in document[key]]
            if all(map(right, values)):
                return values
        for place, record in enumerate(document[key], 1):
            who = f"number {place} of its list '{key}'"
            if not isinstance(record, dict):
                raise refuse(f"{who} is no record: {cut(record)}")
            who += f", id {cut(record['id'])}," if "id" in record else ""
            if name not in record:
                raise refuse(f"{who} lacks '{name}'")
            if not right(record[name]):
                raise refuse(f"{who} has {name} {cut(record[name])}, not {what}")
        raise AssertionError("every record is right")

    numbers = column("images", "id", _is_id, "a whole number or a text")
    names = column("images", "file_name", _is_name, "a file name")
    widths = column("images", "width", _is_side, "a whole number of pixels")
    heights = column("images", "height", _is_side, "a whole number of pixels")
    column("categories", "id", _is_whole, "a whole number")
    called = column("categories", "name", lambda value: type(value) is str, "a text")
    column("annotations", "id", _is_whole, "a whole number")
    of_images = column("annotations", "image_id", _is_id, "the id of an image")
    of_categories = column("annotations", "category_id", _is_whole, "a whole number")
    boxes = column("annotations", "bbox", _is_box, "x, y, width and height, four finite numbers")
    column("annotations", "area", _is_area, "a finite number")
    for record in document["annotations"]:
        if record.get("iscrowd", 0) not in (0, 1):
            raise refuse(f"annotation {record['id']} has iscrowd {cut(record['iscrowd'])}, not 0 or 1")
    try:
        copy.deepcopy(document["categories"])  # as COCO's metric does
    except RecursionError:
        raise refuse("its list 'categories' is nested too deeply") from None
    records, categories = document["annotations"], {record["id"]: i for i, record in enumerate(document["categories"])}
    sizes = dict(zip(numbers, zip(widths, heights, strict=True), strict=True))
    files = dict(zip(numbers, names, strict=True))
    if len(set(map(type, numbers))) > 1:
        raise refuse("the ids of its images are partly numbers and partly texts")
    for key in ("images", "annotations", "categories"):
        seen: set = set()
        for record in document[key]:
            if record["id"] in seen:
                raise refuse(f"more than one of its {key} has the same id, {record['id']!r}")
            seen.add(record["id"])
    if measured and any(record["id"] == 0 for record in records):
        raise refuse("one of its annotations has the id 0, which COCO's metric takes for no match: number them from 1")
    if unknown := [record for record in records if record["category_id"] not in categories]:
        text = f"annotation {unknown[0]['id']} names category {unknown[0]['category_id']}, which is not listed"
        raise refuse(text, len(unknown))
    for (width, height), name in zip(sizes.values(), names, strict=True):
        if width * height > MOST_PIXELS:
            raise refuse(
                f"image {cut(name)} has {width} x {height} pixels, more than the {MOST_PIXELS:,} that are read"
            )
    try:
        absent = list(absent_files(images, names))
    except ValueError as error:  # a name that no file can have
        raise refuse(f"one of its file names cannot be one: {error}") from None
    if absent:
        text = f"{len(absent)} of its {len(names)} images are not in {images}, the first is {printable(absent[0])}"
        raise refuse(text)

    # Annotations of images that are not listed are never read.
    known = [place for place, number in enumerate(of_images) if number in sizes]
    limits = [sizes[of_images[place]] for place in known]

    def where(place: int) -> str:
        """An annotation, by its place among those that are read."""
        record = records[known[place]]
        return f"annotation {record['id']} of image {record['image_id']!r}, {printable(files[record['image_id']])},"

    if known:
        beyond = np.flatnonzero(outside(np.array([boxes[place] for place in known], np.float64), np.array(limits)))
        if len(beyond):
            first = beyond[0]
            text = f"the box {boxes[known[first]]} of {where(first)} is outside its {size_text(limits[first])} pixels"
            raise refuse(text, len(beyond))
    shapes = [records[place].get("segmentation") for place in known]
    if not masks:
        for place, shape in enumerate(shapes):
            try:
                pickle.dumps(shape)  # as mmdet's data set keeps it, used or not
            except RecursionError:
                raise refuse(f"{where(place)} has a segmentation that is nested too deeply") from None
    if masks:
        faults = list(undecodable(shapes, limits))
        if faults:
            text = f"{where(faults[0][0])} {faults[0][1]}, and masks are learned or measured"
            bare = sum(not shape for shape in shapes)
            hint += (
                f"; {bare} of {len(shapes)} annotations have no mask: add them, or learn boxes alone, masks: false in a"
                " YAML file of --data (docs/own_data.md)"
            ) * (bare > 0)
            raise refuse(text, len(faults))

    check = _header_check(images)
    listed = list(zip(names, widths, heights, strict=True))
    wrong = list(filter(None, parallel(check, listed, min(32, os.cpu_count() or 1), True, "image headers")))
    if wrong:
        raise refuse(wrong[0], len(wrong))
    labels = [categories[number] for number in of_categories]
    return Categories(str(ann), called, list(categories), labels, of_images)


def _header_check(images: StrPath) -> Callable[[tuple[str, int, int]], str | None]:
    """A function that compares the header of an image with its listed name, width and height."""

    def check(listed: tuple[str, int, int]) -> str | None:
        name, width, height = listed
        try:
            real = image_size(Path(images) / name, whole=False)
        except Exception as error:  # Pillow raises many types for the many ways a file can be broken
            return f"image {printable(name)} cannot be read: {' '.join(str(error).split())[:200]}"
        if real != (width, height):
            return f"image {printable(name)} is {size_text(real)} pixels, listed as {width} x {height}"
        return None

    return check


def _is_whole(value: Any) -> bool:
    return type(value) is int and -LARGEST < value < LARGEST  # not True, which is an int to isinstance


def _is_id(value: Any) -> bool:
    return _is_whole(value) or type(value) is str


def _is_side(value: Any) -> bool:
    return type(value) is int and 1 <= value < LARGEST


def _is_name(value: Any) -> bool:
    return type(value) is str and value != ""


def _is_area(value: Any) -> bool:
    return type(value) in NUMBERS and -LARGEST < value < LARGEST


def _is_box(value: Any) -> bool:
    if type(value) is not list or len(value) != 4 or {type(number) for number in value} - NUMBERS:
        return False
    x, y, width, height = value
    return -LARGEST < x < LARGEST and -LARGEST < y < LARGEST and 0 <= width < LARGEST and 0 <= height < LARGEST
