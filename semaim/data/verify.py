"""Find all that is wrong with a detection data set: every record and every image is read, and nothing is written.

What ends a training is found before it starts by the quicker `semaim.data.coco.check_coco_file`.
"""

from collections import Counter
from pathlib import Path

import numpy as np

from semaim.data.coco import SLACK, absent_files, outside, read_coco
from semaim.data.coco_masks import FEWEST, cut, damaged_runs
from semaim.data.findings import Note, Report, StrPath, image_size, parallel, shortened, size_text
from semaim.errors import UserError

RLE_SLACK = 2.0  # pixels between the edges of a mask and those of its box
ID, NUMBER = (int, str), (int, float)


def verify_coco(
    ann: StrPath, images: StrPath, workers: int = 4, progress: bool = False, any_id: bool = False
) -> Report:
    """Check every record of a COCO annotation file and every image it names.

    Args:
        ann: the annotation file.
        images: folder that its file names are relative to.
        workers: threads.
        progress: show a bar if the standard error is a terminal.
        any_id: whether annotations may have the id 0, as they may in data of one's own.

    `UserError` if there is nothing to check: no such file or folder, no JSON, no images or annotations.
    """
    document = read_coco(ann, images)
    report = Report(str(ann))
    listed = _records(report, document, "images", {"file_name": str, "width": NUMBER, "height": NUMBER})
    categories = _records(report, document, "categories", {"name": str})
    annotations = _records(report, document, "annotations", {"image_id": ID, "category_id": ID, "bbox": list})

    absent = set(absent_files(images, (record["file_name"] for record in listed.values())))
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
        if number == 0 and not any_id:
            report.warning("id 0, with which validation is refused: COCO's metric takes it for no match", where)
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
    if outside(box[None], np.array([size]))[0]:
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
        report.warning("no segmentation, so that masks cannot be learned", where)
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
            elif len(points) < FEWEST:
                report.problem("polygon of fewer than 3 points", f"{where}: {polygon}")
            elif not ((points >= -SLACK) & (points.reshape(-1, 2) <= np.array(size) + SLACK).ravel()).all():
                report.problem("polygon outside its image", f"{where}: {size_text(size)} pixels")


def _check_rle(report: Report, rle: dict, box: np.ndarray, where: str, size: tuple) -> None:
    width, height = map(int, size)
    if rle.get("size") != [height, width]:
        text = f"{where}: {cut(rle.get('size'))}, the image has height, width {[height, width]}"
        report.problem("size of run lengths differs from the image's", text)
        return
    if fault := damaged_runs(rle, (width, height)):
        report.problem("damaged run lengths", f"{where}: {fault}")
        return
    try:
        from pycocotools import mask
    except ImportError:
        raise UserError("run lengths need pycocotools, which is not installed: pip install pycocotools") from None
    packed = rle if isinstance(rle["counts"], str) else mask.frPyObjects(rle, height, width)
    pixels = int(mask.decode(packed).sum())
    x, y, w, h = mask.toBbox(packed).tolist()
    if not pixels:
        report.problem("empty mask", where)
    elif len(box) == 4:
        theirs = np.array([*box[:2], *(box[:2] + box[2:])])
        if not (abs(theirs - [x, y, x + w, y + h]) <= RLE_SLACK).all():
            report.warning("mask and box differ", f"{where}: mask in {[x, y, w, h]}, box {box.tolist()}")
