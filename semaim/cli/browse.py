"""Look at training images after augmentation: tools/browse.py CONFIG --out FILE.png (see --help)."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from semaim.cli.options import add_flags
from semaim.errors import UserError, writing

if TYPE_CHECKING:
    from PIL import Image


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="A picture of training images as a detector or segmentor gets them in its first epoch: augmented,"
        " with their boxes, masks or class maps. Grey is padding.",
    )
    parser.add_argument("config", help="config file")
    parser.add_argument("--out", required=True, metavar="FILE.png", help="where to write the picture")
    parser.add_argument(
        "--images", type=int, default=8, metavar="N", help="number, spread over the data (default: %(default)s)"
    )
    add_flags(parser, "--data-root", "--classes", "--data", "--cfg-options")
    return parser.parse_args(argv)


def make_grid(pictures: Sequence[Image.Image], captions: Sequence[str], columns: int = 4) -> Image.Image:
    """Pictures side by side, each in the upper left corner of its cell as in a padded batch, its caption below."""
    from PIL import Image, ImageDraw

    from semaim.drawing.objects import READABLE, font_of, shorten, text_size

    columns = min(columns, len(pictures))
    size = text_size((READABLE, READABLE))
    font = font_of(size)
    wide, high = (max(picture.size[axis] for picture in pictures) for axis in (0, 1))
    gap, below = size // 2, 2 * size
    rows = math.ceil(len(pictures) / columns)
    grid = Image.new("RGB", (columns * (wide + gap) + gap, rows * (high + below) + gap), "white")
    draw = ImageDraw.Draw(grid)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = gap + i % columns * (wide + gap), gap + i // columns * (high + below)
        draw.rectangle((x, y, x + wide - 1, y + high - 1), fill=(225, 225, 225))
        grid.paste(picture, (x, y))
        draw.text((x, y + high + size // 4), shorten(caption, font, wide), font=font, fill="black")
    return grid


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    args = parse_args(argv, prog)
    out = Path(args.out)
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out {out}: name a .png, .jpg or .webp file")
    if args.images < 1:
        raise UserError(f"--images {args.images}: give 1 or more")
    import numpy as np  # takes seconds, as what follows
    from mmengine.registry import DATASETS

    from semaim.data.described import as_yaml
    from semaim.drawing.objects import (
        READABLE,
        Instances,
        add_legend,
        draw_classes,
        draw_instances,
        shares_of,
    )
    from semaim.engine.config import load_config
    from semaim.engine.dense import SeededImages, build, check_dense, enter
    from semaim.engine.own_data import set_data
    from semaim.engine.predicting import to_picture
    from semaim.reading import read_once

    cfg = load_config(args.config, args.cfg_options)
    check_dense(cfg)
    with read_once():
        set_data(cfg, args.data_root, args.data, args.classes)
    enter(cfg)
    images = SeededImages(build(cfg.train_dataset, DATASETS, "train_dataset"), cfg.seed)
    if not len(images):
        raise UserError(f"train_dataset: no images with annotations in {cfg.train_dataset.data_root}")
    items = []
    for index in np.linspace(0, len(images) - 1, min(args.images, len(images))).round().astype(int).tolist():
        items.append(images[0, index])

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
    picture = make_grid(pictures, captions)
    if maps:
        shares = shares_of(np.concatenate([classes.ravel() for classes in maps]), len(images.classes))
        picture = add_legend(picture, shares, images.classes)
    with writing(out):
        picture.save(out)
    print(f"wrote {out}: {len(items)} of {len(images)} images")
    if cfg.get("own_data"):
        print(as_yaml(cfg.own_data.to_dict()))
    return 0
