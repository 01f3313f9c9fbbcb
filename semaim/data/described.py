"""The description of a data set of one's own: a YAML file, read strictly, and the same as text.

root: data/roads
train: {images: images/train, labels: labels/train}     # label maps; or annotations: COCO's file
val: {images: images/val, labels: labels/val}           # may be left out: a share is held out
classes: [road, car, rest]                              # or {0: road, 7: car}: value of the label maps -> name
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from semaim.data.findings import shortened
from semaim.data.pairs import HELD_OUT
from semaim.errors import UserError, nearest

#: Keys of a description and what they mean.
KEYS = {
    "root": "folder that all others are relative to; --data-root replaces it",
    "train": "images, and labels or annotations, that are trained on",
    "val": "the same of those validated on; left out, a share of the images of train is held out",
    "classes": "names in the order of their values 0, 1, ...; or value: name; for COCO's files they may be left out",
    "ignored": "values of the label maps that are neither trained nor measured, default [255]",
    "palette": "colours [red, green, blue] of the classes, in their order",
    "masks": "for COCO's files: false to learn and measure boxes alone, as where no annotation has a mask",
    "held_out": f"share of the images that is validated on if there is no val, default {HELD_OUT}",
    "image_suffix": "end of the images' names, if it is more than a suffix such as .jpg",
    "label_suffix": "end of the label maps' names, such as _mask.png",
}
#: Keys of train and val.
PARTS = {
    "images": "folder of the images",
    "labels": "folder of the label maps",
    "annotations": "COCO's annotation file",
    "list": "text file of names without suffix, as VOC's",
}
IGNORED = (255,)
UNLISTED = 254  #: class number of a value that is neither a class nor ignored, and the most classes of label maps
BACKGROUND = "background"  #: the other class of a data set with one
Description = dict[str, Any]


class _Strict(yaml.SafeLoader):
    """PyYAML's safe loader; a key that is given twice is an error, where it takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for place, key in enumerate(keys) if key in keys[:place]]:
            raise yaml.MarkedYAMLError(problem=f"{twice[0]!r} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def read_description(file: str | os.PathLike) -> Description:
    """The content of a YAML file; `UserError` for what is not known, or of a wrong type."""
    try:
        found = _Strict(Path(file).read_text("utf-8")).get_single_data()
    except OSError as error:
        raise UserError(f"cannot read --data {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--data {file} is no text in UTF-8: save it as UTF-8") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"--data {file} is no YAML: {' '.join(str(error).split())[:200]}") from None
    return check_description(found, str(file))


def check_description(found: Any, where: str) -> Description:
    """The description, if it is one; paths are not looked for. `UserError` names the nearest key."""
    if not isinstance(found, Mapping):
        raise UserError(f"{where}: give keys and values, {', '.join(KEYS)} (docs/own_data.md)")
    _known(found, KEYS, where)
    for key in ("root", "image_suffix", "label_suffix"):
        if key in found and not (isinstance(found[key], str) and found[key]):
            raise UserError(f"{where}: {key} is {found[key]!r}: give a text, {KEYS[key]}")
    share = found.get("held_out", HELD_OUT)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        raise UserError(f"{where}: held_out is {share!r}: give a share of the images, between 0 and 1")
    if not isinstance(found.get("masks", True), bool):
        raise UserError(f"{where}: masks is {found['masks']!r}: give true or false")
    if "val" in found and "held_out" in found:
        raise UserError(f"{where}: held_out is for a data set without val: leave one of them out")
    for name in ("train", "val"):
        if name in found:
            _check_part(found[name], f"{where}: {name}")
    if "train" in found and "val" in found and ("labels" in found["train"]) != ("labels" in found["val"]):
        raise UserError(f"{where}: train and val have labels and annotations: give both the same kind")
    values = found.get("ignored", list(IGNORED))
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 256 for value in values):
        raise UserError(f"{where}: ignored is {values!r}: give a list of values from 0 to 255")
    if "classes" in found:
        _check_classes(found["classes"], set(values), where)
    if "palette" in found:
        _check_palette(found["palette"], found.get("classes"), where)
    return {key: dict(value) if isinstance(value, Mapping) else value for key, value in found.items()}


def _known(found: Mapping, known: Mapping[str, str], where: str) -> None:
    for key in found:
        if key not in known:
            raise UserError(f"{where}: unknown key {key}: {nearest(str(key), known)}")


def _check_part(part: Any, where: str) -> None:
    if not isinstance(part, Mapping):
        raise UserError(f"{where} is {part!r}: give {{images: DIR, labels: DIR}} or {{images: DIR, annotations: FILE}}")
    _known(part, PARTS, where)
    for key, value in part.items():
        if not (isinstance(value, str) and value):
            raise UserError(f"{where}: {key} is {value!r}: give a path, {PARTS[key]}")
    if "images" not in part:
        raise UserError(f"{where} lacks images: {PARTS['images']}")
    if ("labels" in part) == ("annotations" in part):
        raise UserError(f"{where}: give either labels, {PARTS['labels']}, or annotations, {PARTS['annotations']}")
    if "list" in part and "labels" not in part:
        raise UserError(f"{where}: list is for label maps: COCO's file lists its images itself")


def _check_classes(classes: Any, ignored: set[int], where: str) -> None:
    if isinstance(classes, Mapping):
        if any(isinstance(value, list) for value in classes.values()):
            raise UserError(
                f"{where}: classes by colour are not read: write the label maps with one number per class, and give"
                " {number: name}"
            )
        if wrong := [value for value in classes if type(value) is not int or not 0 <= value < 256]:
            raise UserError(f"{where}: classes: {wrong[0]!r} is no value from 0 to 255: give value: name")
        if both := sorted(ignored & set(classes)):
            raise UserError(f"{where}: the value {both[0]} is a class and ignored: set ignored to others")
        names = list(classes.values())
    elif isinstance(classes, list):
        names = classes
    else:
        raise UserError(f"{where}: classes is {classes!r}: give a list of names, or value: name")
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise UserError(f"{where}: classes: give at least one name, each a text (in quotes, if it looks like a number)")
    if isinstance(classes, list) and len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{where}: classes: {twice!r} is named twice")


def _check_palette(palette: Any, classes: Any, where: str) -> None:
    right = isinstance(palette, list) and all(
        isinstance(colour, list)
        and len(colour) == 3
        and all(type(number) is int and 0 <= number < 256 for number in colour)
        for colour in palette
    )
    if not right:
        raise UserError(f"{where}: palette: give a list of colours [red, green, blue], from 0 to 255")
    names = list(dict.fromkeys(classes.values() if isinstance(classes, Mapping) else classes or ()))
    count = 2 if isinstance(classes, list) and len(names) == 1 else len(names)
    if names and len(palette) != count:
        counted = f"{count} classes" + " with the background" * (count > len(names))
        raise UserError(f"{where}: palette has {len(palette)} colours, there are {counted}")


def classes_and_values(description: Mapping[str, Any]) -> tuple[list[str], list[list[int]]]:
    """The names of the classes in the order of their numbers, and the values of the label maps that mean each.

    One name is against the background: 0 is the background, 1 or 255 the class.
    """
    classes = description["classes"]
    if isinstance(classes, Mapping):
        names = list(dict.fromkeys(classes.values()))
        return names, [[value for value, name in classes.items() if name == other] for other in names]
    if len(classes) == 1:
        return [BACKGROUND, *classes], [[0], [1, 255]]
    return list(classes), [[value] for value in range(len(classes))]


def ignored_values(description: Mapping[str, Any]) -> list[int]:
    """The values of the label maps that are ignored."""
    alone = not isinstance(description["classes"], Mapping) and len(description["classes"]) == 1
    return list(description.get("ignored", () if alone else IGNORED))


def renumbered(values: Sequence[Sequence[int]], ignored: Sequence[int]) -> dict[int, int]:
    """Value -> the number that mmseg's loading has to write for it, of the values that it has to change.

    A value that is neither a class nor ignored must not be taken for the number of a class, or for mmseg's 255.
    """
    numbers = {value: number for number, group in enumerate(values) for value in group}
    numbers |= dict.fromkeys(ignored, 255)
    numbers |= {value: UNLISTED for value in (*range(len(values)), 255) if value not in numbers}
    return {value: number for value, number in sorted(numbers.items()) if value != number}


def unclear(
    values: Sequence[Sequence[int]], ignored: Sequence[int], names: Sequence[str], pixels: Mapping[int, int]
) -> str | None:
    """Why it is not certain which class each value of the label maps is, and what to write; None if it is certain.

    Args:
        values, ignored: of the description.
        names: of the classes.
        pixels: value -> its number of pixels in the label maps.
    """
    known = {value for group in values for value in group} | set(ignored)
    strange = sorted(set(pixels) - known)
    alone = [list(group) for group in values] == [[0], [1, 255]]
    if set(pixels) == {0, 255} and list(values) == [[0], [1]] and 255 in ignored:
        return (
            f"the label maps hold 0 and 255 alone, and 255 is ignored, so all is {names[0]}: if 255 is {names[1]}, give"
            f" this name alone, as --classes {names[1]}"
        )
    if not strange and not (alone and {1, 255} <= set(pixels)):
        return None
    if pixels and max(pixels) > 255:
        return (
            f"the label maps hold values up to {max(pixels)}, and 0 to 255 are read: write others first,"
            f" semaim convert-labels values MAPS OUT {max(pixels)}=NEW ..., with NEW from 0 to 254"
        )
    total = sum(pixels.values())
    found = [f"{value} ({pixels[value] / total:.1%})" for value in sorted(pixels)]
    stated = ", ".join(f"{'/'.join(map(str, group))} {name}" for group, name in zip(values, names, strict=True))
    because = f"{shortened(list(map(str, strange)))} is none of them" if strange else "1 and 255 both occur"
    options = ", ".join(f"{value}: NAME" for value in sorted(pixels)[:12])
    return (
        f"the label maps hold {shortened(found, 12)}; stated are {stated}, ignored"
        f" {', '.join(map(str, ignored)) or 'none'}, so {because}. Write what each value is to a YAML file of --data:"
        f" classes: {{{options}}}, and those that mean nothing to ignored: [...]"
    )


def as_yaml(description: Mapping[str, Any], flat: bool = False) -> str:
    """A description as YAML, in the order of `KEYS`; in one line if `flat`."""
    kept = {key: description[key] for key in KEYS if key in description}
    if flat:
        return yaml.safe_dump(kept, sort_keys=False, default_flow_style=True, width=10**6, allow_unicode=True).strip()
    lines = []
    for key, value in kept.items():
        text = yaml.safe_dump(
            {key: value} if not isinstance(value, list | dict) else value,
            sort_keys=False, default_flow_style=isinstance(value, list | dict), width=10**6, allow_unicode=True,
        ).strip()  # fmt: skip
        lines.append(f"{key}: {text}" if isinstance(value, list | dict) else text)
    return "\n".join(lines)
