"""Completes the description of data of one's own: from a folder, --classes and a YAML file to all that is needed."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from semaim.data.coco import read_coco
from semaim.data.described import UNLISTED, Description, check_description, classes_and_values, read_description
from semaim.data.findings import shortened
from semaim.data.layouts import annotation_files, find_coco, find_maps
from semaim.data.pairs import HELD_OUT, check_apart, label_suffix_of, pair_up
from semaim.errors import UserError

SPLITS = ("train", "val")
LEAST = 40  #: difference of two colours, summed over red, green and blue, with which classes can be told apart


def describe(
    kind: str | None, root: str | None, file: str | None = None, named: Sequence[str] | None = None
) -> Description:
    """The description of the data, complete; nothing is read but folders, and COCO's files.

    Args:
        kind: what is needed, annotations or labels; None for what there is, perhaps label maps without classes.
        root: of --data-root; None for the file's.
        file: of --data; None for what is found in the root.
        named: the classes of --classes; None for the file's, or COCO's.
    """
    given = read_description(file) if file else {}
    where = f"--data {file}" if file else f"--data-root {root}"
    root = root or given.get("root")
    if root is None:
        raise UserError(f"{where}: it has no root: add it, or --data-root DIR" if file else "give --data-root DIR, too")
    if not os.path.isdir(root):
        raise UserError(f"no such folder: {root} (name the data with --data-root DIR)")
    if named is not None and "classes" in given:
        raise UserError(f"--classes and the classes of {file}: leave one of them out")
    given |= {"root": root} | ({"classes": list(named)} if named is not None else {})
    check_description(given, where)
    if "train" not in given:
        if "val" in given:
            raise UserError(f"{where}: it has val and no train: name both, or none to have them looked for")
        coco = kind == "annotations" or (kind is None and annotation_files(Path(root)))
        found = (find_coco if coco else find_maps)(root)
        if "held_out" in given and "val" in found:
            raise UserError(f"{where}: held_out is for data without a validation split, which {root} has")
        given = {**found, **given}
    if kind is not None and kind not in given["train"]:
        raise UserError(f"{where}: train has no {kind}, which the config reads")
    check_paths(given, where)
    if "val" not in given:
        given.setdefault("held_out", HELD_OUT)
    return _annotated(given, where) if "annotations" in given["train"] else _mapped(given, where, kind is None)


def check_paths(given: Mapping[str, Any], where: str) -> None:
    """`UserError` if a file or folder of a description does not exist."""
    for name in SPLITS:
        for key, path in given.get(name, {}).items():
            whole = os.path.join(given["root"], path)
            if not (os.path.isdir if key in ("images", "labels") else os.path.isfile)(whole):
                what = "folder" if key in ("images", "labels") else "file"
                raise UserError(f"{where}: {name}: {key}: no such {what}: {whole}")


def _annotated(given: Description, where: str) -> Description:
    """A description of COCO's files, with the names of their categories, and `masks`: false where they have none."""
    files: dict[str, list[str]] = {}
    masked = False
    for name in SPLITS:
        if part := given.get(name):
            folder = os.path.join(given["root"], part["images"])
            document = read_coco(os.path.join(given["root"], part["annotations"]), folder)
            masked |= any(isinstance(record, dict) and record.get("segmentation") for record in document["annotations"])
            records = (*document["images"], *document["categories"])
            if not all(isinstance(record, dict) for record in records):
                continue  # the check before training says where
            files[name] = [os.path.join(folder, str(record.get("file_name"))) for record in document["images"]]
            names = [str(record.get("name")) for record in document["categories"]]
            if isinstance(given.get("classes"), Mapping):
                raise UserError(f"{where}: classes by value are for label maps: COCO's file has its own numbers")
            if name == "train" and set(given.get("classes", names)) != set(names):
                raise UserError(
                    f"{where}: classes are {', '.join(given['classes'])}, the categories of {part['annotations']}"
                    f" {shortened(names)}: leave them out, and select some with --cfg-options"
                    f' "keep_classes=[{",".join(names[:2])}]"'
                )
            if name == "train":
                given["classes"] = names
    if not masked:
        given.setdefault("masks", False)
    if "val" in files:
        check_apart(files.get("train", []), files["val"], where)
    elif len(set(files.get("train", []))) == 1:
        raise UserError(f"{given['root']} has one image: none can be held out for validation")
    return given


def _mapped(given: Description, where: str, open_classes: bool) -> Description:
    """A description of label maps, with the palette and the end of their names."""
    root, pairs = given["root"], {}
    if "masks" in given:
        raise UserError(f"{where}: masks is for COCO's files, not for label maps: leave it out")
    for name in SPLITS:
        if part := given.get(name):
            images, labels = (os.path.join(root, part[key]) for key in ("images", "labels"))
            if "label_suffix" not in given:
                end = label_suffix_of(images, labels, given.get("image_suffix"))
                given |= {"label_suffix": end} if end else {}
            pairs[name] = paired(given, name)[0]
    if "classes" not in given and not open_classes:
        raise UserError(
            f"{root}: name the classes of the label maps in the order of their values 0, 1, ..., --classes A,B,C;"
            f" or value: name in a YAML file, --data FILE.yaml (docs/own_data.md); `semaim verify data {root}` shows"
            " which values there are"
        )
    if (count := len(classes_and_values(given)[0]) if "classes" in given else 0) > UNLISTED:
        raise UserError(f"{where}: {count} classes: label maps can have {UNLISTED}, as their values end at 255")
    trained = [image for image, _ in pairs["train"]]
    if "val" in pairs:
        check_apart(trained, [image for image, _ in pairs["val"]], where)
    elif len(trained) == 1:
        raise UserError(f"{root} has one image: none can be held out for validation")
    if "palette" not in given and "classes" in given and (colours := palette_of(given, pairs["train"][0][1])):
        given["palette"] = colours
    return given


def paired(given: Mapping[str, Any], name: str) -> tuple[list[tuple[str, str]], list[str]]:
    """See `pair_up`: of a split of a description of label maps."""
    part, root = given[name], given["root"]
    listed = os.path.join(root, part["list"]) if "list" in part else None
    images, labels = (os.path.join(root, part[key]) for key in ("images", "labels"))
    return pair_up(images, labels, listed, given.get("image_suffix"), given.get("label_suffix"))


def palette_of(given: Mapping[str, Any], label_map: str) -> list[list[int]] | None:
    """The colours of the classes in a paletted label map; None if it has none, or they look alike."""
    try:
        with Image.open(label_map) as file:
            flat = file.getpalette() if file.mode == "P" else None
    except (OSError, ValueError):
        return None  # the check of all maps says what is wrong
    colours = [list(flat[3 * value : 3 * value + 3]) for value, *_ in classes_and_values(given)[1]] if flat else []
    apart = [sum(abs(a - b) for a, b in zip(one, other, strict=False)) for i, one in enumerate(colours)
             for other in colours[:i]]  # fmt: skip
    return colours if colours and all(map(len, colours)) and min(apart, default=0) >= LEAST else None
