#!/usr/bin/env python
"""Look at a run: tools/visualize.py order CHECKPOINT IMAGES... --out FILE.png, or curve WORK_DIR --out FILE.png."""

import argparse
import sys
from pathlib import Path

from mmengine.config import DictAction

from semaim.data.folder import centre_crops, find_images
from semaim.errors import UserError, run
from semaim.pictures import draw_curve, draw_orders, read_scalars


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pictures of what a run did.")
    commands = parser.add_subparsers(dest="command", required=True)
    order = commands.add_parser("order", help="similarity map, order and reconstruction of images")
    order.add_argument("checkpoint", help="of a pretraining run, such as work_dirs/NAME/latest.pth")
    order.add_argument("images", nargs="+", help="image files, or folders of them")
    order.add_argument("--most", type=int, default=8, help="show at most so many images (default: %(default)s)")
    order.add_argument(
        "--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="change keys of the run's config"
    )
    curve = commands.add_parser("curve", help="loss and learning rate over the iterations")
    curve.add_argument("work_dir", help="work folder of a run")
    for command in (order, curve):
        command.add_argument("--out", required=True, metavar="FILE.png", help="where to write the picture")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    out = Path(args.out)
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out {out}: name a .png, .jpg or .webp file")
    if args.command == "curve":
        picture = draw_curve(read_scalars(args.work_dir), title=Path(args.work_dir).name)
    else:
        from semaim.engine.checkpointing import read_checkpoint
        from semaim.engine.pretraining import model_from_checkpoint

        checkpoint = read_checkpoint(args.checkpoint)
        model = model_from_checkpoint(checkpoint, args.cfg_options)
        paths = [path for given in args.images for path in (find_images(given) if Path(given).is_dir() else [given])]
        images = centre_crops(paths[: args.most], checkpoint["config"]["model"]["network"]["img_size"])
        picture = draw_orders(model, images, title=f"{Path(args.checkpoint).name}, epoch {checkpoint['epoch']}")
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out)
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
