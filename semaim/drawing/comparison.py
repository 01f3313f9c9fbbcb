"""What a detector or segmentor finds in images of its validation set, beside what is there."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mmengine.config import Config
from mmengine.registry import MODELS, TRANSFORMS
from PIL import Image, ImageDraw

from semaim.checkpoints.normalisation import settle
from semaim.drawing.prediction import (
    READABLE,
    Instances,
    add_legend,
    build_pipeline,
    class_names,
    draw_classes,
    draw_instances,
    font_of,
    percent,
    predict,
    shares_of,
    shorten,
    text_size,
)
from semaim.engine.dense import build, build_data, check_dense, enter, load_whole
from semaim.errors import UserError

Pair = tuple[Image.Image, Image.Image, str]  #: what is there, what was found, and a line about it


def draw_predictions(
    cfg: Config, weights: str, paths: Sequence[str] = (), most: int = 8, threshold: float = 0.3, columns: int = 1
) -> Image.Image:
    """What is there and what was found side by side, an image a row; of classes also their annotated shares.

    Args:
        cfg: the detector's or segmentor's config; names the validation set.
        weights: its checkpoint.
        paths: images of that set; nothing for `most` spread over it.
        most: show at most so many.
        threshold: least score of a found object.
        columns: pairs beside each other.
    """
    check_dense(cfg)
    enter(cfg)
    settle(cfg, weights)
    (images,) = build_data(cfg, ("val_dataset",))
    chosen = choose(images, paths, most)
    model = build(cfg.model, MODELS, "model")
    load_whole(model, weights, lambda line: None)
    model.eval()
    pipeline, names = build_pipeline(cfg), class_names(cfg, weights)
    # The truth is that of the whole image, so of the steps only those that read.
    steps = [step for step in cfg.test_pipeline if step["type"].startswith("Load")]
    reading = [build(step, TRANSFORMS, f"test_pipeline, {step['type']}") for step in steps]
    pairs, maps = [], []
    for index in chosen:
        info = images.get_data_info(index)
        path = info["img_path"]
        image, sample = predict(model, pipeline, path)
        for step in reading:
            info = step(info)
        scale = READABLE / max(image.size)
        if cfg.default_scope == "mmseg":
            true, found = info["gt_seg_map"], sample.pred_sem_seg.data.squeeze(0).cpu().numpy()
            maps.append((true.ravel(), found.ravel()))
            known = true < len(names)
            right = f"{percent((true == found)[known].mean())} of the pixels right" if known.any() else "unlabelled"
            drawn = [draw_classes(image, classes, len(names), scale) for classes in (true, found)]
        else:
            true, found = truth_of(info), Instances.of(sample.pred_instances).above(threshold)
            right = f"{len(true.labels)} there, {len(found.labels)} found"
            drawn = [draw_instances(image, objects, names, scale) for objects in (true, found)]
        pairs.append((*drawn, f"{Path(path).name}: {right}"))
    rows = -(-len(pairs) // columns)
    picture = beside([side_by_side(pairs[first : first + rows]) for first in range(0, len(pairs), rows)])
    if not maps:
        return picture
    true, found = (shares_of(np.concatenate(parts), len(names)) for parts in zip(*maps, strict=True))
    return add_legend(picture, true | {label: 0.0 for label in found if label not in true}, names)


def choose(images, paths: Sequence[str], most: int) -> list[int]:
    """Places of these paths in a data set, or of images spread over it."""
    if not paths:
        return np.linspace(0, len(images) - 1, min(most, len(images))).round().astype(int).tolist()
    places = {Path(images.get_data_info(index)["img_path"]).resolve(): index for index in range(len(images))}
    for path in paths[:most]:
        if Path(path).resolve() not in places:
            example = next(iter(places))
            raise UserError(
                f"{path} is none of the {len(places)} annotated validation images, such as {example}: for any image,"
                " tools/predict.py"
            )
    return [places[Path(path).resolve()] for path in paths[:most]]


def truth_of(info: dict) -> Instances:
    """The annotated objects of an image as mmdet's loading left them, without crowds."""
    kept = ~np.asarray(info["gt_ignore_flags"], dtype=bool)
    boxes, labels = info["gt_bboxes"].tensor.numpy().reshape(-1, 4), np.asarray(info["gt_bboxes_labels"])
    masks = info.get("gt_masks")
    masks = None if masks is None else masks.to_ndarray().astype(bool)[kept]
    return Instances(boxes[kept], labels[kept], None, masks)


def beside(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures from left to right, on white."""
    whole = Image.new("RGB", (sum(it.width for it in pictures), max(it.height for it in pictures)), "white")
    left = 0
    for picture in pictures:
        whole.paste(picture, (left, 0))
        left += picture.width
    return whole


def side_by_side(pairs: Sequence[Pair], heads: tuple[str, str] = ("annotated", "predicted")) -> Image.Image:
    """Pairs of pictures under two heads, the line of each below it."""
    size = text_size((READABLE, READABLE))
    font, gap, line = font_of(size), size // 2, 2 * size
    width = max(left.width for left, _, _ in pairs)
    heights = [left.height + line for left, _, _ in pairs]
    whole = Image.new("RGB", (2 * width + 3 * gap, sum(heights) + line + gap), "white")
    draw, top = ImageDraw.Draw(whole), line + gap // 2
    for place, head in enumerate(heads):
        draw.text((gap + place * (width + gap), gap), head, font=font, fill="black")
    for (left, right, text), height in zip(pairs, heights, strict=True):
        whole.paste(left, (gap, top))
        whole.paste(right, (2 * gap + width, top))
        below = top + left.height + size // 4
        draw.text((gap, below), shorten(text, font, whole.width - 2 * gap), font=font, fill="black")
        top += height
    return whole
