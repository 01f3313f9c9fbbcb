"""Labelled class folders for fine-tuning, probing and k-NN: `root/train/CLASS/...` and `root/val/CLASS/...`.

Or `root/CLASS/...`, of which a share of each class is held out for validation.

As in pretraining, all randomness of a sample comes from (seed, epoch, index).
"""

import copy
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.transforms import MaybeToTensor
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode, v2

from semaim.data.contents import start_below
from semaim.data.corruptions import SMALLEST, Corrupt
from semaim.data.decoding import load_image
from semaim.data.folder import find_images
from semaim.data.layouts import IMAGES, LABELS, SPLITS, TESTS
from semaim.data.pairs import HELD_OUT, part_of
from semaim.data.seeding import seeded
from semaim.errors import UserError

#: How training images are augmented. Every one ends in a horizontal flip with probability 1/2 and normalisation.
AUGMENTS = {
    "randaugment": "random crop, resized; RandAugment, random erasing (fine-tuning: MAE, SemAIM)",
    "resized_crop": "random crop, resized (linear probing: MAE, SAIM)",
    "random_crop": "resized, then a random crop of the same size (linear probing: official SemAIM)",
    "none": "as validation images, without the flip (features of k-NN and the fast probe)",
}

#: Names of folders that are no classes, so that data in another layout are not taken for class folders.
NO_CLASSES = {*SPLITS["train"], *SPLITS["val"], *TESTS, *IMAGES, *LABELS}


def find_labelled(root: str | os.PathLike, split: str) -> tuple[list[str], list[int], list[str]]:
    """Paths, labels and class names of the images in `root/split`; its folders are the classes, in sorted order.

    Where the root itself has the class folders (`is_flat`), "train" and "val" are parts of each class.
    """
    flat = is_flat(root)
    folder = Path(root) if flat else Path(root) / split
    if not folder.is_dir():
        raise UserError(
            f"no such folder: {folder} (labelled data is {root}/train/CLASS/... and {root}/val/CLASS/..., or"
            f" {root}/CLASS/...; name it with --data-root DIR)"
        )
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"no class folders in {folder}: images belong in {folder}/CLASS/")
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = find_images(folder / name)
        found = part_of_class(found, folder, name, split) if flat else found
        paths += found
        labels += [label] * len(found)
    return paths, labels, classes


def is_flat(root: str | os.PathLike) -> bool:
    """Whether a folder has class folders with images in them, and none that is named like a split or a label map's."""
    if not os.path.isdir(root):
        return False
    folders = [entry for entry in os.scandir(os.fspath(root)) if entry.is_dir() and not entry.name.startswith(".")]
    if len(folders) < 2 or any(entry.name.lower() in NO_CLASSES for entry in folders):
        return False
    return all(any(name.lower().endswith(IMG_EXTENSIONS) for name in os.listdir(entry)) for entry in folders)


def part_of_class(paths: list[str], root: Path, name: str, split: str) -> list[str]:
    """The images of a class, of a data set without validation split, that are in "train" or "val"; at least one."""
    if len(paths) < 2:
        raise UserError(f"{root / name} has one image: for training and validation each class needs two")
    named = {os.path.relpath(path, root): path for path in paths}
    kept = part_of(named, split, HELD_OUT)
    return [path for other, path in named.items() if other in kept]


def first_of_each(paths: list[str], labels: list[int], classes: list[str], count: int) -> tuple[list[str], list[int]]:
    """The first `count` paths of each class, and their labels; `UserError` if a class has fewer."""
    if type(count) is not int or count < 1:  # True is an int too
        raise UserError(f"dataset.images_per_class {count!r}: give 1 or more, or None for all")
    chosen = []
    for label, name in enumerate(classes):
        places = [place for place, own in enumerate(labels) if own == label]
        if len(places) < count:
            raise UserError(f"dataset.images_per_class {count}: class {name} has {len(places)} training images")
        chosen += places[:count]
    return [paths[place] for place in chosen], [labels[place] for place in chosen]


def check_classes(train: list[str], val: list[str], root: str | os.PathLike) -> None:
    """`UserError` if the two splits have different classes: equal numbers would mean different classes."""
    for has, lacks, split in ((train, val, "val"), (val, train, "train")):
        if missing := sorted(set(has) - set(lacks)):
            shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise UserError(
                f"{Path(root) / split} lacks the class folder{'s' if len(missing) > 1 else ''} {shown}: both splits"
                " need the same classes"
            )


def evaluation_transform(
    img_size: int,
    crop_pct: float = 0.875,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    crop_mode: str | None = None,
    interpolation: str | None = None,
    corruption: str | None = None,
    severity: int = 0,
):
    """Short side to img_size / crop_pct pixels (bicubic), centre crop, normalised floats: 256 and 224 on ImageNet.

    With a `crop_mode`, timm's own transform of that mode (center, squash, border) and interpolation. A `corruption` of
    `semaim.data.corruptions` is applied to the crop before it is normalised; at severity 0 there is none.
    """
    corrupt = [Corrupt(corruption, severity)] if corruption is not None and severity != 0 else []
    if corrupt and img_size < SMALLEST:
        raise UserError(f"images of {img_size} pixels cannot be corrupted: {SMALLEST} or more are needed")
    if crop_mode is not None:
        if crop_mode not in ("center", "squash", "border"):
            raise UserError(f"dataset.crop_mode is {crop_mode!r}: choose center, squash or border")
        theirs = create_transform(
            img_size,
            interpolation=interpolation or "bicubic",
            crop_pct=crop_pct,
            crop_mode=crop_mode,
            mean=tuple(mean),
            std=tuple(std),
        )
        cropped = next(place for place, step in enumerate(theirs.transforms) if isinstance(step, MaybeToTensor))
        theirs.transforms[cropped:cropped] = corrupt
        return theirs
    if interpolation not in (None, "bicubic"):
        raise UserError("dataset.interpolation needs dataset.crop_mode")
    return v2.Compose(
        [
            v2.Resize(round(img_size / crop_pct), interpolation=InterpolationMode.BICUBIC),
            v2.CenterCrop(img_size),
            *corrupt,
            *_to_normalised(mean, std),
        ]
    )


def draws(transform) -> bool:
    """Whether a step of an evaluation transform draws random numbers."""
    return any(isinstance(step, Corrupt) for step in transform.transforms)


def training_transform(
    img_size: int,
    augment: str = "randaugment",
    min_scale: float = 0.08,
    rand_augment: str = "rand-m9-mstd0.5-inc1",
    random_erase: float = 0.25,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
):
    """PIL image -> normalised floats (3, S, S).

    Args:
        img_size: side of the crop in pixels.
        augment: a name of `AUGMENTS`.
        min_scale: smallest share of the image's area that a resized crop may have.
        rand_augment: timm's name of the policy.
        random_erase: probability that a rectangle is replaced by noise.
        mean, std: of the three channels of pixels from 0 to 1.
    """
    if augment not in AUGMENTS:
        raise UserError(f"unknown dataset.augment {augment!r}: choose from {', '.join(AUGMENTS)}")
    if augment == "none":
        raise UserError("dataset.augment 'none' is for features only: training needs another")
    if augment == "randaugment":
        return create_transform(
            img_size,
            is_training=True,
            scale=(min_scale, 1.0),
            color_jitter=None,  # type: ignore[arg-type]  # timm's own default for policies; its annotation lacks it
            auto_augment=rand_augment,
            interpolation="bicubic",
            re_prob=random_erase,
            re_mode="pixel",
            re_count=1,
            mean=tuple(mean),
            std=tuple(std),
        )
    bicubic = InterpolationMode.BICUBIC
    if augment == "resized_crop":
        crop = [v2.RandomResizedCrop(img_size, scale=(min_scale, 1.0), interpolation=bicubic)]
    else:
        crop = [v2.Resize(img_size, interpolation=bicubic), v2.RandomCrop(img_size)]
    return v2.Compose([*crop, v2.RandomHorizontalFlip(), *_to_normalised(mean, std)])


def _to_normalised(mean: Sequence[float], std: Sequence[float]) -> list:
    return [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean, std),
    ]


class LabelledImages(Dataset):
    """Images in class folders.

    Args:
        root: folder that holds `train` and `val`, each with one folder per class, or the class folders.
        img_size: side of the crops in pixels.
        split: "train" or "val".
        augment: a name of `AUGMENTS`; None for the evaluation transform.
        crop_pct: share of the resized image that evaluation's crop covers, along a side; None for 0.875.
        crop_mode, interpolation: of evaluation as timm knows them; None for a centre crop, bicubic.
        seed: of the run.
        mean, std: of the three channels of pixels from 0 to 1; None for ImageNet's.
        corruption, severity: of validation images, see `semaim.data.corruptions`; severity 0 or neither for clean ones.
        images_per_class: train on this many images of each class, the first by name; None for all. Validation uses all.
        **augmentation: further arguments of `training_transform`.

    The key of an item is its index, or (epoch, index) for random augmentation. An item is a dict of `image`, float
    (3, S, S), normalised; `label`; and `index`.
    """

    metainfo: dict = {}  # mmengine reads it

    def __init__(
        self,
        root: str,
        img_size: int = 224,
        split: str = "train",
        augment: str | None = None,
        crop_pct: float | None = 0.875,
        seed: int = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        images_per_class: int | None = None,
        crop_mode: str | None = None,
        interpolation: str | None = None,
        corruption: str | None = None,
        severity: int | None = None,
        **augmentation,
    ):
        if (corruption is None) != (severity is None):
            raise UserError(f"dataset.corruption is {corruption} and dataset.severity {severity}: set both or none")
        paths, labels, self.classes = find_labelled(root, split)
        if images_per_class is not None and split == "train":
            paths, labels = first_of_each(paths, labels, self.classes, images_per_class)
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.labels = np.array(labels)
        self.root, self.img_size, self.seed = root, img_size, seed
        self.held_out = HELD_OUT if is_flat(root) else None
        self.augmented = augment not in (None, "none")
        mean, std = mean or IMAGENET_DEFAULT_MEAN, std or IMAGENET_DEFAULT_STD
        self._evaluation = (img_size, crop_pct or 0.875, mean, std, crop_mode, interpolation)
        self.transform = (
            evaluation_transform(*self._evaluation, *((corruption, severity or 0) if split == "val" else ()))
            if augment is None or augment == "none"
            else training_transform(img_size, augment, **augmentation, mean=mean, std=std)
        )

    def corrupted(self, corruption: str, severity: int) -> "LabelledImages":
        """The same images with the evaluation transform, corrupted; see `semaim.data.corruptions`."""
        images = copy.copy(self)
        images.transform = evaluation_transform(*self._evaluation, corruption, severity)
        return images

    def __len__(self) -> int:
        return len(self.paths)

    def names(self) -> list[str]:
        """Paths relative to `root`, in the order of the indices."""
        prefix = start_below(self.root)
        return [os.fsdecode(path[prefix:]) for path in self.paths.tolist()]

    def preparation(self) -> str:
        """How an image is made from its file: the transform, and the seed where it draws numbers."""
        return repr(self.transform) + (f", seed {self.seed}" if self.augmented or draws(self.transform) else "")

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor | int]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image = load_image(os.fsdecode(self.paths[index]))
        with seeded(self.seed, epoch, index):
            image = self.transform(image)
        return {"image": image, "label": int(self.labels[index]), "index": index}


setattr(LabelledImages.__init__, "arguments_of", training_transform)  # noqa: B010  # for the check of config keys
