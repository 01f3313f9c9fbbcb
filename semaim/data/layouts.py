"""Which folders and files of a data set of one's own are the images, and which the labels or annotations.

What is found is a description, as in a YAML file of --data (`semaim.data.described`): nothing is guessed. If there are
two readings, both are named and neither is taken.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

from semaim.data.coco import absent_files, read_coco
from semaim.data.described import as_yaml
from semaim.data.pairs import MAPS
from semaim.data.shards import printable
from semaim.errors import UserError

#: Names of folders of images, and of folders of label maps, in any case.
IMAGES = ("images", "image", "imgs", "img", "jpegimages", "photos", "photographs")
LABELS = ("labels", "label", "annotations", "masks", "mask", "labeltrainids", "segmentationclass", "gt")
#: Names of a split's folder, or in the name of an annotation file, perhaps with a year behind them.
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation")}
TESTS = ("test", "testing")
TRIED = 20  #: images of an annotation file of which a folder has to hold one, to be looked through for the others
DEEPEST = 3  #: levels of folders below the root in which the images of an annotation file are looked for
Description = dict[str, Any]


class NotFound(UserError):
    """No layout is recognised."""


def one_of(found: list[Description], root: str, what: str) -> Description:
    """The only reading; `UserError` if there are none or several, which are listed with the YAML to write."""
    if not found:
        raise NotFound(what)
    if len(found) > 1:
        shown = "; or ".join(_words(reading) for reading in found[:4])
        first = as_yaml({"root": root, **found[0]}, flat=True)
        raise UserError(f"{root} can be read in {len(found)} ways: {shown}. Write the right one to a YAML file, such as"
                        f" {first}, and give it as --data FILE.yaml")  # fmt: skip
    return {"root": root, **found[0]}


def find_maps(root: str) -> Description:
    """The images and label maps of a segmentation data set."""
    tree = Path(root)
    text = (
        f"no images with label maps in {root}: it needs a folder of images ({', '.join(IMAGES)}) beside one of label"
        f" maps ({', '.join(LABELS)}), with or without train and val folders inside or around them; or name the folders"
        " in a YAML file, --data FILE.yaml (docs/own_data.md)"
    )
    found = list(_readings(tree))
    if len(found) > 1:  # VOC's folder Annotations holds XML files
        held = {part["labels"]: _holds_maps(tree / part["labels"]) for reading in found for part in reading.values()}
        found = [reading for reading in found if all(held[part["labels"]] for part in reading.values())] or found
    return one_of(found, root, text)


def _holds_maps(folder: Path) -> bool:
    """Whether there is a file below a folder that can be a label map by its suffix."""
    return any(name.lower().endswith(MAPS) for _, _, names in os.walk(folder) for name in names)


def _readings(root: Path) -> Iterator[Description]:
    """All readings of a tree as folders of images and of label maps."""
    top = _folders(root)
    for images, labels in product(_named(top, IMAGES), _named(top, LABELS)):
        inner = {side: _folders(root / side) for side in (images, labels)}
        lists = _voc_lists(root)
        if lists:
            yield {name: {"images": images, "labels": labels, "list": file} for name, file in lists.items()}
            continue
        options = []
        for name, words in SPLITS.items():
            both = product(_named(inner[images], words), _named(inner[labels], words))
            options.append([(name, {"images": f"{images}/{a}", "labels": f"{labels}/{b}"}) for a, b in both])
        yield from _combined(options, {"images": images, "labels": labels})
    options = []
    for name, words in SPLITS.items():
        part = []
        for split in _named(top, words):
            inside = _folders(root / split)
            pairs = product(_named(inside, IMAGES), _named(inside, LABELS))
            part += [(name, {"images": f"{split}/{a}", "labels": f"{split}/{b}"}) for a, b in pairs]
        options.append(part)
    yield from _combined(options, None)


def _combined(options: list[list[tuple[str, dict]]], flat: dict | None) -> Iterator[Description]:
    """Readings from the possible folders of training and of validation; `flat` is taken where there are none."""
    train, val = options
    if not train:
        if flat and not val:
            yield {"train": flat}
        return
    for first, *second in product(train, *([val] if val else [])):
        yield dict([first, *second])


def _voc_lists(root: Path) -> dict[str, str]:
    """VOC's lists of the names of both splits."""
    folder = "ImageSets/Segmentation"
    there = {name for name in ("train", "val", "trainval") if (root / folder / f"{name}.txt").is_file()}
    if {"train", "val"} <= there:
        return {name: f"{folder}/{name}.txt" for name in ("train", "val")}
    return {"train": f"{folder}/{min(there, key=len)}.txt"} if there - {"val"} else {}


def find_coco(root: str) -> Description:
    """The annotation files of a detection data set and the folders of their images."""
    files = annotation_files(Path(root))
    text = f"no COCO annotation file in {root}: looked for *.json in it, in annotations/ and in folders of splits"
    if not files:
        raise NotFound(f"{text}; or name it in a YAML file, --data FILE.yaml (docs/own_data.md)")
    by_split: dict[str, list[str]] = {}
    for file in files:
        by_split.setdefault(split_of(file), []).append(file)
    by_split.pop("test", None)
    if "all" in by_split and "train" in by_split:
        by_split["train"] += by_split.pop("all")
    train = by_split.get("train") or by_split.get("all") or []
    val = by_split.get("val")
    choices = [dict(zip(SPLITS, files, strict=False)) for files in product(train, *([val] if val else []))]
    found = []
    for choice in choices:
        parts = {}
        for name, file in choice.items():
            parts[name] = {"images": images_of(root, file), "annotations": file}
        found.append(parts)
    return one_of(found, root, f"{root}: none of {', '.join(files[:5])} is of training images by its name")


def annotation_files(root: Path) -> list[str]:
    """COCO's instance annotations below a folder, relative to it: *.json in it, in annotations/, and one level down."""
    places = [path for folder in ("annotations", ".") for path in _jsons(root / folder)]
    for split in _named(_folders(root), (*SPLITS["train"], *SPLITS["val"], *TESTS)):
        places += _jsons(root / split)
    instances = [path for path in places if path.name.startswith("instances")]
    return [path.relative_to(root).as_posix() for path in instances or places if _is_coco(path)]


def _jsons(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.json") if not path.name.startswith(".")) if folder.is_dir() else []


def _is_coco(path: Path) -> bool:
    """Whether a file begins or ends like COCO's, which has lists of images and categories; the rest is not read."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(1 << 16)
        file.seek(max(0, size - (1 << 16)))
        ends = head + file.read()
    if size < 1 << 20:
        try:
            document = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            return False
        return isinstance(document, dict) and {"images", "annotations", "categories"} <= document.keys()
    return any(f'"{key}"'.encode() in ends for key in ("categories", "images", "annotations"))


def split_of(file: str) -> str:
    """train, val, test or all, by the words in the name of an annotation file and of its folder."""
    words = set(re.findall(r"[a-z]+", file.lower()))
    for name, known in (*SPLITS.items(), ("test", TESTS)):
        if words & set(known):
            return name
    return "all"


def images_of(root: str, annotations: str) -> str:
    """The folder, relative to the root, in which all images of an annotation file lie; `UserError` if there is none."""
    document = read_coco(Path(root) / annotations, root)
    names = [record.get("file_name") if isinstance(record, dict) else None for record in document["images"]]
    named = [name for name in names if isinstance(name, str) and name and "\0" not in name]
    if not named:
        raise UserError(f"{root}/{annotations} is no COCO annotation file: its images have no file_name")
    holding = [folder for folder in _below(Path(root))
               if any(os.path.isfile(os.path.join(root, folder, name)) for name in named[:TRIED])]  # fmt: skip
    absent = {folder: list(absent_files(os.path.join(root, folder), named)) for folder in holding}
    whole = [folder for folder, names in absent.items() if not names]
    if not whole:
        best, lacking = min(absent.items(), key=lambda item: len(item[1]), default=("", named))
        where = f"{best} lacks {len(lacking)}" if best else "none of them is there"
        where += f", such as {printable(lacking[0])}"
        where += "; write / in place of \\ in its file names" * all("\\" in name for name in named)
        raise UserError(f"{root}/{annotations}: no folder in {root} holds all its {len(named)} images: {where}")
    if len(whole) > 1:
        raise UserError(
            f"{root}/{annotations}: {len(whole)} folders hold all its images, {', '.join(whole[:4])}: name the right"
            f" one in a YAML file, such as {as_yaml({'root': root, 'train': {'images': whole[0], 'annotations': annotations}}, flat=True)},"  # noqa: E501
            " and give it as --data FILE.yaml"
        )
    return whole[0]


def _below(root: Path, depth: int = DEEPEST) -> Iterator[str]:
    """The root, ".", and the folders below it, relative."""
    for folder, inner, _ in os.walk(root):
        there = Path(folder).relative_to(root)
        inner[:] = sorted(name for name in inner if not name.startswith(".")) if len(there.parts) < depth else []
        yield there.as_posix()


def _folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _named(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Those names that are known, in any case."""
    return [name for name in names if name.lower() in known]


def _words(reading: Description) -> str:
    """A reading in words."""
    parts = []
    for name in ("train", "val"):
        if part := reading.get(name):
            kind = "annotations" if "annotations" in part else "labels"
            parts.append(f"{name} from {part['images']} with {part[kind]}")
    return ", ".join(parts)
