"""Pictures of encoders and runs: tools/visualize.py order SOURCE IMAGES... --out FILE.png, and more (see --help)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from semaim.cli.options import add_flags
from semaim.errors import UserError, writing

if TYPE_CHECKING:
    from PIL import Image

#: Pictures of an encoder or a pretraining checkpoint: command -> what it shows.
LOOKS = {
    "order": "similarity map, order and, of a pretraining, reconstruction of images",
    "attention": "the class token's attention on the patches, in the last block of our own ViT",
    "similarity": "similarity of the patches to the class token, which decides the centre, and to the centre",
    "pca": "the first three principal components of the patch tokens as colours, similarity map and order",
    "reconstruction": "the predicted pixels of a pretraining; for MAE also what it sees",
}


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=prog, description="Pictures of what a run did.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in LOOKS.items():
        look = commands.add_parser(name, help=text, description=f"A picture of {text}.")
        look.add_argument(
            "source",
            metavar="SOURCE",
            help="a pretraining's checkpoint, such as work_dirs/NAME/latest.pth, or any encoder: a checkpoint of any"
            " dialect, timm:NAME[.TAG], hf-hub:OWNER/REPO, local-dir:DIR",
        )
        look.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
        look.add_argument("--size", type=int, metavar="PIXELS", help="side of the images (default: the encoder's)")
        add_flags(look, "--arch")
        look.add_argument("--across", action="store_true", help="one column per image instead of one row")
        look.add_argument(
            "--import", nargs="+", metavar="MODULE", default=[], dest="modules",
            help="modules that register the checkpoint's method, if it is your own",
        )  # fmt: skip
        if name == "order":
            look.add_argument(
                "--compare", action="store_true", help="raster, stochastic, similarity and semantic order, side by side"
            )
    predictions = commands.add_parser(
        "predictions",
        help="objects or classes of validation images, annotated and predicted",
        description="A picture of what a detector or segmentor finds in images of its validation set, next to the"
        " annotations. For any other image, use tools/predict.py.",
    )
    predictions.add_argument(
        "checkpoint", metavar="FILE", help="of a detector or segmentor, such as work_dirs/NAME/latest.pth"
    )
    predictions.add_argument(
        "images", nargs="*", help="image files of the validation set, or folders (default: spread over it)"
    )
    predictions.add_argument("--config", required=True, help="config file of the training")
    add_flags(predictions, "--data-root")
    predictions.add_argument(
        "--score-thr", type=float, default=0.3, metavar="S", help="least score of an object (default: %(default)s)"
    )
    predictions.add_argument(
        "--columns", type=int, default=1, metavar="N", help="images per row (default: %(default)s)"
    )
    for command in (*(commands.choices[name] for name in LOOKS), predictions):
        command.add_argument("--most", type=int, default=8, help="largest number of images (default: %(default)s)")
        add_flags(command, "--cfg-options")
    curve = commands.add_parser("curve", help="loss and learning rate over the iterations")
    curve.add_argument("work_dir", metavar="DIR", help="work folder of a run")
    for command in commands.choices.values():
        command.add_argument("--out", required=True, metavar="FILE.png", help="where to write the picture")
    return parser.parse_args(argv)


def look(args: argparse.Namespace, paths: list[str]) -> Image.Image:
    """The picture of an encoder."""
    from semaim.data.folder import centre_crops
    from semaim.drawing import encoder as pictures
    from semaim.engine.looking import model_to_draw
    from semaim.registry import import_modules

    if args.size is not None and args.size < 1:
        raise UserError(f"--size {args.size}: give 1 or more")
    import_modules(args.modules)
    draw = {
        "order": pictures.draw_comparison if args.command == "order" and args.compare else pictures.draw_orders,
        "attention": pictures.draw_attention,
        "similarity": pictures.draw_similarity,
        "pca": pictures.draw_components,
        "reconstruction": pictures.draw_reconstruction,
    }[args.command]
    model, size, title = model_to_draw(args.source, args.arch, args.size, args.cfg_options)
    return draw(model, centre_crops(paths[: args.most], size), title, args.across)


def predictions(args: argparse.Namespace, paths: list[str]) -> Image.Image:
    """The picture of a detector's or segmentor's checkpoint."""
    from semaim.engine.config import load_config, set_data_root
    from semaim.engine.dense import is_dense
    from semaim.engine.predicting import draw_predictions

    if not 0 <= args.score_thr <= 1:
        raise UserError(f"--score-thr {args.score_thr}: give a number from 0 to 1")
    if args.columns < 1:
        raise UserError(f"--columns {args.columns}: give 1 or more")
    cfg = load_config(args.config, args.cfg_options)
    if args.data_root and is_dense(cfg):
        set_data_root(cfg, args.data_root)
    return draw_predictions(cfg, args.checkpoint, paths, args.most, args.score_thr, args.columns)


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    args = parse_args(argv, prog)
    out = Path(args.out)
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out {out}: name a .png, .jpg or .webp file")
    if args.command == "curve":
        from semaim.drawing.curves import draw_curve
        from semaim.results.logs import read_scalars

        picture = draw_curve(read_scalars(args.work_dir), title=Path(args.work_dir).name)
    else:
        if args.most < 1:
            raise UserError(f"--most {args.most}: give 1 or more")
        from semaim.data.folder import find_images  # takes seconds

        paths = [path for given in args.images for path in (find_images(given) if Path(given).is_dir() else [given])]
        picture = (predictions if args.command == "predictions" else look)(args, paths)
    with writing(out):
        picture.save(out)
    print(f"wrote {out}")
    return 0
