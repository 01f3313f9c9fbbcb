"""Predict images with a detector or segmentor: tools/predict.py CONFIG FILE IMAGES... --out DIR (see --help)."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from semaim.cli.options import add_flags
from semaim.errors import UserError

if TYPE_CHECKING:
    import torch


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Predict images with a trained detector or segmentor. Writes a picture of each, DIR/NAME.png, and"
        " all results in COCO's format, DIR/predictions.json.",
        epilog="In predictions.json, image_id is the image's path as given, file_name its name; boxes are x, y, width,"
        " height in pixels of the image. category_id is the class's id in the config's validation annotations, if that"
        " file exists, else COCO's own (1 to 90) for its 80 classes, else label + 1; which of these is printed. A"
        " segmentor's results are in COCO's stuff format: one mask for each class in an image. Images whose long side"
        " is below 480 pixels are enlarged in the pictures.",
    )
    parser.add_argument("config", help="config file of the training")
    parser.add_argument("checkpoint", metavar="FILE", help="its checkpoint, such as work_dirs/NAME/latest.pth")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--score-thr", type=float, default=0.3, metavar="S", help="least score of an object (default: %(default)s)"
    )
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    add_flags(parser, "--cfg-options")
    return parser.parse_args(argv)


def device_of(name: str | None) -> torch.device:
    """The device to run on; `UserError` if it does not exist."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).strip().splitlines()[0]}") from None
    return device


def picture_names(paths: Sequence[str]) -> list[str]:
    """A file name without extension for each image's picture: the image's own, with its folders if not unique."""
    stems = Counter(Path(path).stem.lower() for path in paths)
    common = os.path.commonpath([os.path.abspath(os.path.dirname(path)) for path in paths])
    names: dict[str, None] = {}
    for path in paths:
        name = Path(path).stem
        if stems[name.lower()] > 1:
            folders = Path(os.path.relpath(os.path.abspath(path), common)).parent.parts
            name = "_".join((*folders, name))
        taken = {other.lower() for other in names}  # some file systems ignore case
        number = 2
        while (numbered := name if number == 2 else f"{name}_{number - 1}").lower() in taken:
            number += 1
        names[numbered] = None
    return list(names)


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    args = parse_args(argv, prog)
    from mmengine.registry import MODELS  # takes seconds, as what follows

    from semaim.data.folder import find_images
    from semaim.drawing.objects import (
        Instances,
        add_legend,
        draw_classes,
        draw_instances,
        name_of,
        percent,
        shares_of,
    )
    from semaim.engine.config import load_config
    from semaim.engine.dense import build, check_dense, enter, load_whole
    from semaim.engine.encoders import settle_images
    from semaim.engine.predicting import (
        build_pipeline,
        category_ids,
        class_names,
        class_results,
        coco_results,
        predict,
    )

    cfg = load_config(args.config, args.cfg_options)
    check_dense(cfg)
    if not 0 <= args.score_thr <= 1:
        raise UserError(f"--score-thr {args.score_thr}: give a number from 0 to 1")
    given = [path for name in args.images for path in (find_images(name) if Path(name).is_dir() else [name])]
    paths, out, device = list(dict.fromkeys(given)), Path(args.out), device_of(args.device)
    pictures = [out / f"{name}.png" for name in picture_names(paths)]
    if both := {path.resolve() for path in pictures} & {Path(path).resolve() for path in paths}:
        raise UserError(f"--out {out} would overwrite {sorted(both)[0]}: name another folder")
    enter(cfg)
    statistics = settle_images(cfg, args.checkpoint, whole=True)
    model = build(cfg.model, MODELS, "model")
    load_whole(model, args.checkpoint, print)
    print(f"images normalised with {statistics}")
    model.to(device).eval()
    pipeline, names = build_pipeline(cfg), class_names(cfg, args.checkpoint)
    ids, origin = category_ids(cfg, names)
    print(f"{len(names)} classes; category_id: {origin}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out {out}: {error.strerror}") from None

    results, broken = [], []
    try:
        for path, picture in zip(paths, pictures, strict=True):
            try:
                image, sample = predict(model, pipeline, path)
            except UserError as error:  # continue with the others
                broken.append(str(error))
                continue
            if "pred_sem_seg" in sample:
                classes = sample.pred_sem_seg.data.squeeze(0).cpu().numpy()
                shares = shares_of(classes, len(names))
                results += class_results(path, classes, ids)
                drawn = add_legend(draw_classes(image, classes, len(names)), shares, names)
                line = ", ".join(f"{name_of(names, label)} {percent(share)}" for label, share in shares.items())
            else:
                found = Instances.of(sample.pred_instances).above(args.score_thr)
                results += coco_results(path, found, ids)
                drawn = draw_instances(image, found, names)
                counts = Counter(name_of(names, label) for label in found.labels.tolist())
                line = ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "nothing found"
            drawn.save(picture)
            print(f"{path} -> {picture}: {line}")
    finally:  # also after an interrupt
        (out / "predictions.json").write_text(json.dumps(results))
    print(f"wrote {out / 'predictions.json'}: {len(results)} results of {len(paths) - len(broken)} images")
    for line in broken[:-1]:
        print(f"error: {line}", file=sys.stderr)
    if broken:
        more = f" ({len(broken)} of {len(paths)} images failed; the others are predicted)" if len(paths) > 1 else ""
        raise UserError(broken[-1] + more)
    return 0
