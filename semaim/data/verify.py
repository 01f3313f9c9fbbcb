"""Check a detection data set before a training uses it.

`verify_coco` reads everything, images included, and returns a `Report`. `check_coco_file` reads only the annotation
file and the listing of its folder, for the start of a training. Nothing is written.
"""

import gc
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from semaim.data.categories import Categories
from semaim.data.findings import Note, Report, StrPath, image_size, parallel, shortened, size_text
from semaim.errors import UserError
from semaim.reading import once

SLACK = 1.0  # pixels that a box or polygon may extend over the image's edge: files round differently
RLE_SLACK = 2.0  # pixels between the edges of a mask and those of its box
ID, NUMBER = (int, str), (int, float)


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
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is no readable JSON: {error}") from None


def _read_coco(ann: StrPath, images: StrPath) -> dict:
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


def _absent(images: StrPath, names: Iterable[str]) -> Iterator[str]:
    """The names without a file, by one listing of each folder: looking up every file is slow on a network disk."""
    listings: dict[str, set[str]] = {}
    for name in names:
        folder, base = os.path.split(name)
        if folder not in listings:
            path = os.path.join(images, folder)
            listings[folder] = {entry.name for entry in os.scandir(path)} if os.path.isdir(path) else set()
        if base not in listings[folder]:
            yield name


def _outside(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Which boxes (N, 4), x, y, width, height, extend over their images (N, 2), width, height; NaN is outside."""
    corner = boxes[:, :2]
    return ~((corner >= -SLACK) & (corner + boxes[:, 2:] <= sizes + SLACK)).all(axis=1)


@_uncollected()
def check_coco_file(ann: StrPath, images: StrPath) -> Categories:
    """The categories of an annotation file; `UserError` for what would break a training on it. Opens no image.

    Args:
        ann: COCO's annotation file.
        images: folder that its file names are relative to.
    """
    document = _read_coco(ann, images)
    records = document["annotations"]
    hint = f"tools/verify_dataset.py coco --ann {ann} --images {images} lists all problems"
    try:
        sizes = {record["id"]: (record["width"], record["height"]) for record in document["images"]}
        names = [record["file_name"] for record in document["images"]]
        categories = {record["id"]: place for place, record in enumerate(document["categories"])}
        called = [record["name"] for record in document["categories"]]
        distinct = len({record["id"] for record in records})
        unknown = [record for record in records if record["category_id"] not in categories]
        # Annotations of images that are not listed are never read.
        known = [record for record in records if record["image_id"] in sizes]
        boxes = np.array([record["bbox"] for record in known], np.float64).reshape(len(known), 4)
        limits = np.array([sizes[record["image_id"]] for record in known], np.float64).reshape(len(known), 2)
        absent = list(_absent(images, names))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"a record lacks {error}" if isinstance(error, KeyError) else f"a record is damaged ({error})"
        raise UserError(f"{ann} is no COCO annotation file: {what}; {hint}") from None
    outside = np.flatnonzero(_outside(boxes, limits))
    fault = None
    if absent:
        fault = f"{len(absent)} of its {len(names)} images are not in {images}, the first is {absent[0]}"
    elif len(sizes) < len(names) or distinct < len(records):
        fault = "more than one image or annotation has the same id"
    elif unknown:
        fault = f"annotation {unknown[0]['id']} names category {unknown[0]['category_id']}, which is not listed"
        fault += f" ({len(unknown)} such annotations)"
    elif len(outside):
        first = outside[0]
        fault = f"the box {known[first]['bbox']} of annotation {known[first]['id']} is outside its image of "
        fault += f"{size_text(sizes[known[first]['image_id']])} pixels ({len(outside)} such boxes)"
    if fault:
        raise UserError(f"{ann}: {fault}; {hint}")
    labels = [categories[record["category_id"]] for record in records]
    return Categories(str(ann), called, list(categories), labels, [record["image_id"] for record in records])


def verify_coco(ann: StrPath, images: StrPath, workers: int = 4, progress: bool = False) -> Report:
    """Check every record of a COCO annotation file and every image it names.

    Args:
        ann: the annotation file.
        images: folder that its file names are relative to.
        workers: threads.
        progress: show a bar if the standard error is a terminal.

    `UserError` if there is nothing to check: no such file or folder, no JSON, no images or annotations.
    """
    document = _read_coco(ann, images)
    report = Report(str(ann))
    listed = _records(report, document, "images", {"file_name": str, "width": NUMBER, "height": NUMBER})
    categories = _records(report, document, "categories", {"name": str})
    annotations = _records(report, document, "annotations", {"image_id": ID, "category_id": ID, "bbox": list})

    absent = set(_absent(images, (record["file_name"] for record in listed.values())))
    for name in sorted(absent):
        report.problem("image listed but absent", f"{name} is not in {images}")

    def check(record: dict) -> Note | None:
        name, size = record["file_name"], (record["width"], record["height"])
        try:
            real = image_size(Path(images) / name)
        except Exception as error:  # Pillow raises many types for the many ways a file can be broken
            return "broken image", f"{name}: {error}"
        if real != size:
            text = f"{name} is {size_text(real)}, listed as {size_text(size)}"
            return "image size differs from the listed one", text
        return None

    present = [record for record in listed.values() if record["file_name"] not in absent]
    for note in parallel(check, present, workers, progress, "images"):
        if note:
            report.problem(*note)

    counts: Counter = Counter()
    seen = set()
    for number, record in annotations.items():
        where = f"annotation {number}"
        image, category = listed.get(record["image_id"]), categories.get(record["category_id"])
        if image is None:
            report.problem("annotation of an unknown image", f"{where} names image {record['image_id']}")
        if category is None:
            report.problem("annotation of an unknown category", f"{where} names category {record['category_id']}")
        else:
            counts[category["name"]] += 1
        if image is not None:
            seen.add(record["image_id"])
            where += f" in {image['file_name']}"
            size = image["width"], image["height"]
            _check_box(report, record, where, size)
            _check_segmentation(report, record, where, size)

    empty = len(listed) - len(seen)
    report.summary.append(f"{len(listed)} images, {len(annotations)} annotations, {len(categories)} categories")
    if empty:
        report.summary.append(f"images without annotations: {empty} (training leaves them out)")
    report.summary.append(f"annotations per category: {shortened([f'{n} {c}' for n, c in counts.most_common()])}")
    rare = [record["name"] for record in categories.values() if record["name"] not in counts]
    if rare:
        report.summary.append(f"categories without annotations: {shortened(rare)}")
    return report


def _records(report: Report, document: dict, key: str, fields: dict) -> dict:
    """The well-formed records of a list by id, the first of each id; the others are reported."""
    found: dict = {}
    for place, record in enumerate(document[key], 1):
        if not isinstance(record, dict) or not isinstance(record.get("id"), ID):
            report.problem(f"damaged record in '{key}'", f"number {place} has no id")
            continue
        number = record["id"]
        bad = [name for name, kind in fields.items() if not isinstance(record.get(name), kind)]
        bad += [name for name, kind in fields.items() if kind is NUMBER and name not in bad and not record[name] >= 1]
        if bad:
            report.problem(f"damaged record in '{key}'", f"id {number}: no valid {', '.join(bad)}")
        elif number in found:
            report.problem(f"id used twice in '{key}'", f"id {number}")
        else:
            found[number] = record
    return found


def _numbers(values: object) -> np.ndarray:
    """A flat list of numbers as an array; empty for anything else."""
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.empty(0)
    return array if array.ndim == 1 and array.dtype.kind in "iuf" else np.empty(0)


def _check_box(report: Report, record: dict, where: str, size: tuple) -> None:
    box, area = _numbers(record["bbox"]), _numbers([record.get("area")])
    if len(box) != 4 or not np.isfinite(box).all() or (box[2:] < 0).any():
        report.problem("damaged box", f"{where}: {record['bbox']}")
        return
    width, height = box[2:].tolist()
    if _outside(box[None], np.array([size]))[0]:
        report.problem("box outside its image", f"{where}: {record['bbox']} in {size_text(size)} pixels")
    if not len(area) or not np.isfinite(area[0]) or area[0] < 0:
        report.problem("damaged area", f"{where}: {record.get('area')}")
    elif min(width, height) < 1 or area[0] == 0:
        # Not a problem: COCO's own training file has two boxes of height 0, and mmdet skips them.
        text = f"{where}: {width:g} x {height:g} pixels, area {area[0]:g}"
        report.warning("object under a pixel, training leaves it out", text)
    elif area[0] > 1.05 * (width + 1) * (height + 1):
        report.warning("area larger than the box", f"{where}: {area[0]:g} in {width:g} x {height:g} pixels")


def _check_segmentation(report: Report, record: dict, where: str, size: tuple) -> None:
    shape = record.get("segmentation")
    if not shape:
        report.warning("no segmentation, masks are not learned from it", where)
    elif isinstance(shape, dict):
        _check_rle(report, shape, _numbers(record["bbox"]), where, size)
    elif not isinstance(shape, list):
        report.problem("damaged segmentation", f"{where}: neither polygons nor run lengths")
    else:
        for polygon in shape:
            points = _numbers(polygon)
            if not isinstance(polygon, list) or len(points) < len(polygon):
                report.problem("damaged polygon", f"{where}: no list of numbers")
            elif len(points) % 2:
                report.problem("polygon of an odd number of coordinates", f"{where}: {len(points)}")
            elif len(points) < 6:
                report.problem("polygon of fewer than 3 points", f"{where}: {polygon}")
            elif not ((points >= -SLACK) & (points.reshape(-1, 2) <= np.array(size) + SLACK).ravel()).all():
                report.problem("polygon outside its image", f"{where}: {size_text(size)} pixels")


def _check_rle(report: Report, rle: dict, box: np.ndarray, where: str, size: tuple) -> None:
    width, height = map(int, size)
    if rle.get("size") != [height, width]:
        text = f"{where}: {rle.get('size')}, the image has height, width {[height, width]}"
        report.problem("size of run lengths differs from the image's", text)
        return
    # pycocotools does not check that the runs fill the image, and returns uninitialised memory if they do not.
    runs = _runs(rle.get("counts"))
    if not len(runs) or (runs < 0).any() or runs.sum() != width * height:
        report.problem("damaged run lengths", f"{where}: they do not add up to {width} x {height} pixels")
        return
    try:
        from pycocotools import mask
    except ImportError:
        raise UserError("run lengths need pycocotools, which is not installed: pip install pycocotools") from None
    try:
        packed = rle if isinstance(rle["counts"], str) else mask.frPyObjects(rle, height, width)
        pixels = int(mask.decode(packed).sum())
        x, y, w, h = mask.toBbox(packed).tolist()
    except Exception as error:
        report.problem("damaged run lengths", f"{where}: {error}")
        return
    if not pixels:
        report.problem("empty mask", where)
    elif len(box) == 4:
        theirs = np.array([*box[:2], *(box[:2] + box[2:])])
        if not (abs(theirs - [x, y, x + w, y + h]) <= RLE_SLACK).all():
            report.warning("mask and box differ", f"{where}: mask in {[x, y, w, h]}, box {box.tolist()}")


def _runs(counts: object) -> np.ndarray:
    """Run lengths of uncompressed or compressed counts; empty if they are damaged."""
    if not isinstance(counts, str):
        lengths = _numbers(counts)
        return lengths if lengths.dtype.kind in "iu" else np.empty(0, np.int64)
    # Five bits per character, the lowest first; the sixth says that more follow. From the fourth number on, each is the
    # difference to the last but one.
    runs: list[int] = []
    number, shift = 0, 0
    for char in counts:
        value = ord(char) - 48
        if not 0 <= value < 64 or shift > 30:
            return np.empty(0, np.int64)
        number |= (value & 31) << shift
        shift += 5
        if not value & 32:
            number -= (value & 16) << (shift - 4)
            runs.append(number + (runs[-2] if len(runs) > 2 else 0))
            number = shift = 0
    return np.array([] if shift else runs, np.int64)
