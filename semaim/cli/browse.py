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
        description="A picture of training images as the model gets them in its first epoch, augmented: of a detector"
        " with boxes and masks, of a segmentor with class maps. Grey is padding. Mixup and cutmix, which act on a whole"
        " batch, are not shown.",
    )
    parser.add_argument("config", metavar="CONFIG", help="config file")
    parser.add_argument("--out", required=True, metavar="FILE.png", help="where to write the picture")
    parser.add_argument(
        "--images", type=int, default=8, metavar="N", help="number, spread over the data (default: %(default)s)"
    )
    add_flags(parser, "--data-root", "--classes", "--data", "--pretrained", "--cfg-options")
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
    from semaim.data.described import as_yaml  # takes seconds, as what follows
    from semaim.drawing.objects import add_legend
    from semaim.engine.config import load_config
    from semaim.engine.own_data import set_data
    from semaim.reading import read_once
    from semaim.registry import task_for

    cfg = load_config(args.config, args.cfg_options)
    if args.pretrained:
        cfg.pretrained = args.pretrained
    with read_once():
        set_data(cfg, args.data_root, args.data, args.classes)
        seen = task_for(cfg).browse(cfg, args.images)
    picture = make_grid(seen.pictures, seen.captions)
    if seen.shares is not None:
        picture = add_legend(picture, seen.shares, seen.names)
    with writing(out):
        picture.save(out)
    print(f"wrote {out}: {len(seen.pictures)} of {seen.total} images")
    if cfg.get("own_data"):
        print(as_yaml(cfg.own_data.to_dict()))
    return 0
