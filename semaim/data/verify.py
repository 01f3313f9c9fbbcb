"""Finds what is wrong with a detection or segmentation data set before a training meets it.

`verify_coco` and `verify_ade20k` read everything, the images too, and return a `Report`. `check_coco_file` reads the
annotation file and the listing of its folder only: it is for the start of a training. Nothing is ever written.
"""

import gc
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from semaim.errors import UserError

EXAMPLES = 5  # kept of each kind
SLACK = 1.0  # pixels a box or a polygon may reach over the edge: files differ in how they round
RLE_SLACK = 2.0  # pixels between the edges of a mask and those of its box
CHUNK = 16  # images a thread takes at a time
IGNORED = 255
LABEL_MODES = ("L", "P", "I", "I;16", "I;16B")  # Pillow's names of one channel of 8 or 16 bits in a PNG
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and those of its values that swap width and height
SPLITS = {"train": "training", "val": "validation"}  # COCO's and ADE20K's names
ID, NUMBER = (int, str), (int, float)
StrPath = str | os.PathLike


@dataclass
class Finding:
    """One kind of problem or warning: how often, and the first examples."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(example)


@dataclass
class Report:
    """What was found in `name`: lines of figures, and problems and warnings by their kind."""

    name: str
    summary: list[str] = field(default_factory=list)
    problems: dict[str, Finding] = field(default_factory=dict)
    warnings: dict[str, Finding] = field(default_factory=dict)

    def problem(self, kind: str, example: str) -> None:
        """Note something that breaks a training or makes it learn what is wrong."""
        self.problems.setdefault(kind, Finding()).add(example)

    def warning(self, kind: str, example: str) -> None:
        """Note something that a training survives."""
        self.warnings.setdefault(kind, Finding()).add(example)

    def __str__(self) -> str:
        lines = [self.name, *(f"  {line}" for line in self.summary)]
        for title, findings in (("problem", self.problems), ("warning", self.warnings)):
            for kind, finding in findings.items():
                lines += [f"  {title}: {kind}: {finding.count}", *(f"    {text}" for text in finding.examples)]
                if finding.count > len(finding.examples):
                    lines.append(f"    and {finding.count - len(finding.examples)} more")
        problems, warnings = (sum(f.count for f in group.values()) for group in (self.problems, self.warnings))
        found = [f"{n} {name}{'s'[: n > 1]}" for n, name in ((problems, "problem"), (warnings, "warning")) if n]
        return "\n".join([*lines, f"  {', '.join(found) or 'nothing wrong'}"])


Note = tuple[str, str]  # kind and example of a problem


def _parallel(check: Callable, tasks: list, workers: int, progress: bool, title: str) -> list:
    """`check` of every task, in their order, in threads: Pillow decodes without the interpreter's lock."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    chunks = [tasks[start : start + CHUNK] for start in range(0, len(tasks), CHUNK)]
    done = []
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        with Progress(*columns, console=console, transient=True, disable=not (progress and console.is_terminal)) as bar:
            row = bar.add_task(title, total=len(tasks))
            for results in pool.map(lambda chunk: [check(task) for task in chunk], chunks):
                done += results
                bar.advance(row, len(results))
    finally:
        pool.shutdown(cancel_futures=True)  # after an interrupt only the chunks in hand are waited for
    return done


def _image_size(path: Path, whole: bool = True) -> tuple[int, int]:
    """(width, height) as a loader sees it, which turns by EXIF; decodes the whole file, raising what Pillow raises."""
    with Image.open(path) as image:
        try:
            turned = image.getexif().get(ORIENTATION) in TURNED
        except Exception:  # damaged EXIF, which loaders pass over
            turned = False
        size = image.size[::-1] if turned else image.size
        if whole:
            image.draft(None, (1, 1))  # a JPEG is still read to its end, but an eighth of its width is made
            image.load()
    return size


def _pixels(size: Iterable) -> str:
    return " x ".join(map(str, size))


# COCO


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection meanwhile: each pass would go through millions of records in vain."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@_uncollected()
def _read_coco(ann: StrPath, images: StrPath) -> dict:
    """The annotation file; `UserError` where it or the folder is absent, or it has nothing to train on."""
    if not Path(ann).is_file():
        raise UserError(f"no such file: {ann} (COCO's layout: annotations/instances_train2017.json and train2017/)")
    if not Path(images).is_dir():
        raise UserError(f"no such folder: {images} (the images of {ann})")
    try:
        document = json.loads(Path(ann).read_bytes())
    except (ValueError, OSError) as error:
        raise UserError(f"{ann} is no readable JSON: {error}") from None
    for key in ("images", "annotations", "categories"):
        records = document.get(key) if isinstance(document, dict) else None
        if not isinstance(records, list):
            raise UserError(f"{ann} is no COCO annotation file: it has no list '{key}'")
        if not records:
            raise UserError(f"{ann} has no {key}: its list '{key}' is empty")
    return document


def _absent(images: StrPath, names: Iterable[str]) -> Iterator[str]:
    """The names without a file, by one listing of each folder: asking for every file takes long on a network disk."""
    listings: dict[str, set[str]] = {}
    for name in names:
        folder, base = os.path.split(name)
        if folder not in listings:
            path = os.path.join(images, folder)
            listings[folder] = {entry.name for entry in os.scandir(path)} if os.path.isdir(path) else set()
        if base not in listings[folder]:
            yield name


def _outside(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Which boxes (N, 4), x, y, width, height, leave their images (N, 2), width, height; those with NaN do."""
    corner = boxes[:, :2]
    return ~((corner >= -SLACK) & (corner + boxes[:, 2:] <= sizes + SLACK)).all(axis=1)


@_uncollected()
def check_coco_file(ann: StrPath, images: StrPath) -> None:
    """Raise `UserError` for what would break a training on this annotation file, without opening an image.

    Args:
        ann: COCO's annotation file.
        images: folder that the file names in it start from.
    """
    document = _read_coco(ann, images)
    records = document["annotations"]
    hint = f"tools/verify_dataset.py coco --ann {ann} --images {images} lists all that is wrong"
    try:
        sizes = {record["id"]: (record["width"], record["height"]) for record in document["images"]}
        names = [record["file_name"] for record in document["images"]]
        categories = {record["id"] for record in document["categories"]}
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
        fault = "the same id stands for more than one image or annotation"
    elif unknown:
        fault = f"annotation {unknown[0]['id']} names category {unknown[0]['category_id']}, which is not listed"
        fault += f" ({len(unknown)} such annotations)"
    elif len(outside):
        first = outside[0]
        fault = f"the box {known[first]['bbox']} of annotation {known[first]['id']} is outside its image of "
        fault += f"{_pixels(sizes[known[first]['image_id']])} pixels ({len(outside)} such boxes)"
    if fault:
        raise UserError(f"{ann}: {fault}; {hint}")


def verify_coco(ann: StrPath, images: StrPath, workers: int = 4, progress: bool = False) -> Report:
    """Look at every record of a COCO annotation file and at every image it names.

    Args:
        ann: the annotation file.
        images: folder that the file names in it start from.
        workers: threads.
        progress: show a bar, where the standard error is a terminal.

    `UserError` where there is nothing to look at: no such file or folder, no JSON, no images or annotations.
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
            real = _image_size(Path(images) / name)
        except Exception as error:  # Pillow raises many types for the many ways a file can be broken
            return "broken image", f"{name}: {error}"
        if real != size:
            return "image size differs from the listed one", f"{name} is {_pixels(real)}, listed as {_pixels(size)}"
        return None

    present = [record for record in listed.values() if record["file_name"] not in absent]
    for note in _parallel(check, present, workers, progress, "images"):
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
    report.summary.append(f"annotations per category: {_short([f'{n} {c}' for n, c in counts.most_common()])}")
    rare = [record["name"] for record in categories.values() if record["name"] not in counts]
    if rare:
        report.summary.append(f"categories without annotations: {_short(rare)}")
    return report


def _short(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _records(report: Report, document: dict, key: str, fields: dict) -> dict:
    """The well-formed records of a list by their id, the first of each id; what is wrong with the others is noted."""
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
    """A flat list of numbers as an array; empty where it is anything else."""
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
        report.problem("box outside its image", f"{where}: {record['bbox']} in {_pixels(size)} pixels")
    if not len(area) or not np.isfinite(area[0]) or area[0] < 0:
        report.problem("damaged area", f"{where}: {record.get('area')}")
    elif min(width, height) < 1 or area[0] == 0:
        # Not a problem: COCO's own training file has two boxes of height 0, and mmdet passes over them.
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
                report.problem("polygon outside its image", f"{where}: {_pixels(size)} pixels")


def _check_rle(report: Report, rle: dict, box: np.ndarray, where: str, size: tuple) -> None:
    width, height = map(int, size)
    if rle.get("size") != [height, width]:
        text = f"{where}: {rle.get('size')}, the image has height, width {[height, width]}"
        report.problem("size of run lengths differs from the image's", text)
        return
    # pycocotools does not look whether the runs fill the image, and returns memory as it was where they do not.
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
    """Run lengths of uncompressed or compressed counts; empty where they are damaged."""
    if not isinstance(counts, str):
        runs = _numbers(counts)
        return runs if runs.dtype.kind in "iu" else np.empty(0, np.int64)
    # Five bits a character, the lowest first, the sixth says that more follow; from the fourth number on they are
    # differences to the last but one.
    runs, number, shift = [], 0, 0
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


# ADE20K


def _check_pair(pair: tuple[Path, Path], whole: bool = True) -> tuple[Note | None, dict[int, int]]:
    """What is wrong with an image, of which all or only the head is read, and its label map; the pixels per value."""
    image, label = pair
    try:
        size = _image_size(image, whole)
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
        text = f"{label.name}: {_pixels(values.shape[::-1])}, its image {_pixels(size)}"
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

    faults = [text for text in _parallel(fault, pairs, min(32, os.cpu_count() or 1), True, "label maps") if text]
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
        results = _parallel(_check_pair, pairs, workers, progress, split)
        for stem, (note, found) in zip(stems, results, strict=True):
            if note:
                report.problem(note[0], f"{split}/{note[1]}")
                continue
            pixels.update(found)
            beyond = [value for value in found if value > last and value != IGNORED]
            if beyond:
                report.problem(f"label value over {last}", f"{split}/{stem}.png: {_short(list(map(str, beyond)))}")
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
