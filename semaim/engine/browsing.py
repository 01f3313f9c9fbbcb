"""Training images as a model gets them in its first epoch, drawn: what `semaim browse` shows."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from semaim.checkpoints.normalisation import Statistics
from semaim.data.folder import PretrainImages, name_of
from semaim.data.labelled import LabelledImages
from semaim.data.shards import printable
from semaim.drawing.objects import READABLE, Instances, draw_classes, draw_instances, enlargement, shares_of
from semaim.engine.dense import SeededImages
from semaim.engine.predicting import to_picture
from semaim.errors import UserError


class Browsed(NamedTuple):
    """Pictures of some of `total` images, with captions; for class maps also each class's share of the pixels."""

    pictures: Sequence[Image.Image]
    captions: Sequence[str]
    total: int
    names: Sequence[str] = ()
    shares: Mapping[int, float] | None = None


def spread(total: int, count: int) -> list[int]:
    """At most `count` indices, spread over `total`."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()


def browse_images(images: PretrainImages | LabelledImages, statistics: Statistics, count: int) -> Browsed:
    """Images of class folders, or without labels, after augmentation; normalised ones are turned back into colours."""
    pictures, captions = [], []
    for index in spread(len(images), count):
        pixels = torch.as_tensor(images[0, index]["image"])
        picture = Image.fromarray(colours(pixels, statistics).permute(1, 2, 0).numpy())
        scale = enlargement(picture.size)
        name = printable(name_of(os.fsdecode(images.paths[index]), images.root))
        captions.append(f"{picture.width} x {picture.height}: {name}")
        pictures.append(picture.resize([side * scale for side in picture.size], Image.Resampling.NEAREST))
    return Browsed(pictures, captions, len(images))


def colours(pixels: Tensor, statistics: Statistics) -> Tensor:
    """uint8 (3, H, W) of an image that is uint8 already, or floats normalised with these statistics."""
    if pixels.dtype == torch.uint8:
        return pixels
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (statistics.mean, statistics.std))
    return ((pixels * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def browse_dense(images: SeededImages, count: int) -> Browsed:
    """Images of a detector or segmentor after its pipeline, with their boxes, masks or class maps."""
    if not len(images):
        raise UserError(f"train_dataset: no images with annotations in {images.dataset.data_root}")
    items = [images[0, index] for index in spread(len(images), count)]
    scale = READABLE / max(side for item in items for side in item["inputs"].shape[-2:])
    pictures, captions, maps = [], [], []
    for item in items:
        sample, image = item["data_samples"], to_picture(item["inputs"].permute(1, 2, 0).numpy())
        if "gt_sem_seg" in sample:
            maps.append(sample.gt_sem_seg.data.squeeze(0).numpy())
            pictures.append(draw_classes(image, maps[-1], len(images.classes), scale))
        else:
            pictures.append(draw_instances(image, Instances.of(sample.gt_instances), images.classes, scale))
        flipped = ", flipped" if sample.get("flip") else ""
        captions.append(f"{image.width} x {image.height}{flipped}: {Path(sample.get('img_path', '')).name}")
    together = np.concatenate([classes.ravel() for classes in maps]) if maps else None
    shares = None if together is None else shares_of(together, len(images.classes))
    return Browsed(pictures, captions, len(images), images.classes, shares)
