"""Further test sets for the classes of a training set, by folder: ImageNet-V2, -A, -R, -Sketch and any like them."""

import copy
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from semaim.data.folder import find_images
from semaim.data.labelled import LabelledImages
from semaim.errors import UserError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  #: of a test set; metrics begin with it


def open_test_sets(val: LabelledImages, roots: Mapping[str, str]) -> dict[str, LabelledImages]:
    """`open_test_set` of every name; `UserError` for a name that cannot begin a metric's."""
    for name in roots:
        if not NAME.fullmatch(name):
            raise UserError(f"test set {name!r}: give a name of letters, digits, '.', '_' and '-', such as imagenet-a")
    return {name: open_test_set(val, root) for name, root in roots.items()}


def open_test_set(val: LabelledImages, root: str | os.PathLike) -> LabelledImages:
    """The images of another folder, with the labels and the transform of `val`.

    Its class folders lie in `root`, or in `root/val`. They are a part of the classes, by name; or their names are the
    numbers of all classes, from 0, in sorted order, as in ImageNet-V2.

    Raises:
        UserError: a folder is no class; there are none; one has no images.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder} (a further test set is DIR/CLASS/...)")
    if (folder / "val").is_dir() and "val" not in val.classes:
        folder = folder / "val"
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(f"no class folders in {folder}: images belong in {folder}/CLASS/")
    label_of = {name: label for label, name in enumerate(val.classes)}
    if numbered(names, len(val.classes)):
        label_of = {str(label): label for label in range(len(val.classes))} | label_of
    if unknown := next((name for name in names if name not in label_of), None):
        raise UserError(f"{folder / unknown} is no class of {val.root}: a further test set has a part of its classes")
    paths: list[str] = []
    labels: list[int] = []
    for name in names:
        found = find_images(folder / name)
        paths += found
        labels += [label_of[name]] * len(found)
    images = copy.copy(val)
    images.root = str(folder)
    images.paths, images.labels = np.array([os.fsencode(path) for path in paths]), np.array(labels)
    return images


def numbered(names: list[str], classes: int) -> bool:
    """Whether folders have the numbers of all classes as names."""
    return sorted(names) == sorted(map(str, range(classes)))


def predicted_among(labels: np.ndarray, classes: int) -> list[int] | None:
    """The classes that a test set has, if it lacks some: only these are predicted; None if it has all.

    Source: `eval.py` of github.com/hendrycks/natural-adv-examples (ImageNet-A) and of github.com/hendrycks/imagenet-r
    take the logits of the 200 classes that the sets have.
    """
    present = np.unique(labels).tolist()
    return None if len(present) == classes else present


def describe_test_set(name: str, images: LabelledImages) -> str:
    """For the log: how many images and classes, and what can be predicted."""
    classes, found = len(images.classes), np.unique(images.labels)
    text = f"{name}: {len(images):,} images of {len(found)} of {classes} classes in {images.root}"
    if len(found) < classes:
        return text + "; only these are predicted"
    folders = sorted({Path(os.fsdecode(path)).relative_to(images.root).parts[0] for path in images.paths.tolist()})
    numbers = numbered(folders, classes) and folders != sorted(images.classes)
    return text + (f"; its folders 0 to {classes - 1} are the classes in sorted order" if numbers else "")
