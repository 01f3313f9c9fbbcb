"""Predict images and videos with a trained model: tools/predict.py CONFIG FILE IMAGES... --out DIR (see --help)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from semaim.cli.options import add_flags, device_of
from semaim.errors import UserError

if TYPE_CHECKING:
    from semaim.prediction.predictor import Predictor
    from semaim.prediction.writing import Results


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Predict images and videos with a trained detector, segmentor or classifier. Writes a picture of"
        " each image, DIR/NAME.png, a video of each video, DIR/NAME.mp4, and all results, DIR/predictions.json.",
        epilog="In predictions.json, image_id is the file's path as given, file_name its name; entries of a video have"
        " the frame's number, from 0, and its time in seconds. Detectors and segmentors: COCO's format. Boxes are x, y,"
        " width, height in pixels of the image. category_id is the class's id in the config's validation annotations,"
        " if that file exists, else COCO's own (1 to 90) for its 80 classes, else label + 1; which of these is printed."
        " A segmentor's results are in COCO's stuff format: one mask for each class in an image. Classifiers: the five"
        " most probable classes, also in DIR/predictions.csv. Images whose long side is below 480 pixels are enlarged"
        " in the pictures. docs/predict.md has examples.",
    )
    parser.add_argument("config", metavar="CONFIG", help="config file of the training")
    parser.add_argument("checkpoint", metavar="FILE", help="its checkpoint, such as work_dirs/NAME/latest.pth")
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="image files, videos (.mp4, .avi, .mov), or folders of both"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--score-thr", type=float, metavar="S", help="of a detector: least score of an object (default: 0.3)"
    )
    parser.add_argument(
        "--labels",
        action="store_true",
        help="of a segmentor: also write label maps, DIR/labels/NAME.png, whose values are those of the data set's own",
    )
    parser.add_argument("--tta", action="store_true", help="of a segmentor: average over scales and flips")
    parser.add_argument(
        "--max-side",
        type=int,
        metavar="PIXELS",
        help="reduce an image whose long side is longer before it is prepared; results are in pixels of the original",
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of a video: predict every N-th frame")
    add_flags(parser, "--device", "--cfg-options")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """`UserError` for a flag with an impossible value."""
    if args.score_thr is not None and not 0 <= args.score_thr <= 1:
        raise UserError(f"--score-thr {args.score_thr}: give a number from 0 to 1")
    for flag in ("max_side", "every"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} {value}: give 1 or more")


def check_targets(out: Path, paths: Sequence[str], targets: Sequence[Path], labels: bool) -> None:
    """`UserError` if a file would be overwritten that is predicted, or that no earlier prediction has written."""
    if both := {path.resolve() for path in targets} & {Path(path).resolve() for path in paths}:
        raise UserError(f"--out {out} would overwrite {sorted(both)[0]}: name another folder")
    if any((out / name).exists() for name in ("predictions.json", "predictions.json.part")):
        return  # of an earlier prediction, perhaps a killed one
    names = [target.name if target.suffix == ".png" else f"{target.stem}_{0:06d}.png" for target in targets]
    maps = [out / "labels" / name for name in names if labels]
    if lost := next((path for path in (*targets, *maps) if path.exists()), None):
        raise UserError(f"--out {out} would overwrite {lost}, which is of no earlier prediction: name another folder")


def predict_image(predictor: Predictor, path: str, target: Path, results: Results) -> str:
    """Predict an image file and write what is found; returns a line about it."""
    from semaim.data.shards import printable
    from semaim.prediction.predictor import Item
    from semaim.prediction.writing import save_whole

    item = Item(path)
    found = predictor.predict(item)
    save_whole(found.picture, target)
    if found.label_map is not None:
        save_whole(found.label_map, target.parent / "labels" / target.name)
    results.add(item, found)
    return printable(f"{path} -> {target}: {found.words}")


def predict_video(predictor: Predictor, path: str, target: Path, results: Results, every: int) -> Iterator[str]:
    """Predict a video's frames and write what is found; yields lines about it while it goes on."""
    from semaim.data.findings import progress_bar
    from semaim.prediction.inputs import Video
    from semaim.prediction.writing import VideoFile, save_whole

    video = Video(path)
    drawn = VideoFile(target, video.rate / every)
    try:
        with progress_bar(Path(path).name, -(-video.frames // every), True) as advance:
            for item in video.items(every):
                found = predictor.predict(item)
                drawn.add(found.picture)
                if found.label_map is not None:
                    save_whole(found.label_map, target.parent / "labels" / f"{target.stem}_{item.frame:06d}.png")
                results.add(item, found)
                advance(1)
                if drawn.count % 100 == 0:
                    yield f"{path}: {drawn.count} frames, {item.time:.1f} s: {found.words}"
    finally:  # of a damaged video the frames up to there, as after an interrupt
        video.close()
        drawn.close()
    yield f"{path} -> {target}: {drawn.count} frames at {drawn.rate:g} a second"


def predict_all(
    predictor: Predictor, paths: Sequence[str], targets: Sequence[Path], results: Results, every: int
) -> list[str]:
    """Predict every input, with a line for each; returns the errors of those that cannot be predicted."""
    from semaim.data.findings import progress_bar
    from semaim.prediction.inputs import is_video

    broken = []
    with progress_bar("inputs", len(paths), len(paths) > 1 and not any(map(is_video, paths))) as advance:
        for path, target in zip(paths, targets, strict=True):
            try:
                if is_video(path):
                    for line in predict_video(predictor, path, target, results, every):
                        print(line, flush=True)
                else:
                    print(predict_image(predictor, path, target, results))
            except UserError as error:  # continue with the others
                broken.append(str(error))
            advance(1)
    return broken


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    args = parse_args(argv, prog)
    check(args)
    from semaim.engine.config import load_config  # takes seconds, as what follows
    from semaim.prediction.inputs import find_inputs, is_video, output_names
    from semaim.prediction.predictor import Options
    from semaim.prediction.writing import Results
    from semaim.registry import task_for

    cfg, out = load_config(args.config, args.cfg_options), Path(args.out)
    task = task_for(cfg)
    options = Options(args.score_thr, args.labels, args.tta, args.max_side, device_of(args.device))
    paths = find_inputs(args.images, out)
    names = zip(paths, output_names(paths), strict=True)
    targets = [out / f"{name}{'.mp4' if is_video(path) else '.png'}" for path, name in names]
    check_targets(out, paths, targets, args.labels)
    predictor = task.predictor(cfg, args.checkpoint, options)
    print("\n".join(predictor.lines))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out {out}: {error.strerror}") from None

    with Results(out, predictor.columns) as results:
        broken = predict_all(predictor, paths, targets, results, args.every)
    print(f"wrote {out / 'predictions.json'}: {results.count} results of {len(paths) - len(broken)} {kinds(paths)}")
    for line in broken[:-1]:
        print(f"error: {line}", file=sys.stderr)
    if broken:
        more = f" ({len(broken)} of {len(paths)} {kinds(paths)} failed; the others are predicted)"
        raise UserError(broken[-1] + (more if len(paths) > 1 else ""))
    return 0


def kinds(paths: Sequence[str]) -> str:
    """What the inputs are, in a word."""
    from semaim.prediction.inputs import is_video

    videos = [is_video(path) for path in paths]
    return "videos" if all(videos) else "inputs" if any(videos) else "images"
