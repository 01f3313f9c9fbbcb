"""What a trained detector or segmentor finds in images, and what it learns from: as pictures and as JSON."""

import colorsys
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import matplotlib
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, TRANSFORMS
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont
from torch import nn

from semaim import checkpoints
from semaim.data.folder import load_image
from semaim.engine.dense import build
from semaim.errors import UserError
from semaim.places import to_install

#: COCO's ids of its 80 classes, in the order of their labels: 1 to 90, but for those whose classes were dropped.
COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]

READABLE = 480  #: pixels of the long side below which a picture is enlarged, as no text would fit on it
FILL, MAP_FILL = 0.45, 0.6  #: opacity of masks and of class maps, which are read by colour alone


class Instances(NamedTuple):
    """Objects of one image: boxes (N, 4) x1, y1, x2, y2; labels (N,); scores (N,); masks (N, H, W) bool."""

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None = None
    masks: np.ndarray | None = None

    @classmethod
    def of(cls, data: Any) -> "Instances":
        """From mmdet's `pred_instances` or `gt_instances`, on any device."""
        boxes = getattr(data.bboxes, "tensor", data.bboxes)
        scores, masks = data.get("scores"), data.get("masks")
        return cls(
            boxes.detach().float().cpu().numpy().reshape(-1, 4),
            data.labels.cpu().numpy(),
            None if scores is None else scores.detach().float().cpu().numpy(),
            None if masks is None else np.asarray(masks.cpu() if torch.is_tensor(masks) else masks.masks, dtype=bool),
        )

    def above(self, threshold: float) -> "Instances":
        """Those that score at least `threshold`."""
        kept = self.scores >= threshold
        return Instances(*(None if part is None else part[kept] for part in self))


# Drawing


def colour_of(label: int) -> tuple[int, int, int]:
    """The colour of a class, the same in every picture."""
    # Hues in steps of the golden ratio come near one another after 8, 13 and 21 labels: those differ in shade.
    saturation, value = ((0.9, 1.0), (0.5, 1.0), (0.85, 0.6), (0.55, 0.8))[label // 8 % 4]
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(label * 0.618034 % 1, saturation, value))


def name_of(names: Sequence[str], label: int) -> str:
    """A class's name, or its number where the names are too few."""
    return names[label] if label < len(names) else f"class {label}"


@cache
def font_of(size: int) -> ImageFont.FreeTypeFont:
    """A font, so many pixels high."""
    # Comes with matplotlib, so it is everywhere, and knows Greek and Cyrillic, which Pillow's own does not.
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def text_size(size: tuple[int, int]) -> int:
    """Pixels of text that reads well in a picture of (width, height)."""
    return max(12, round(0.025 * math.sqrt(size[0] * size[1])))


def shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, its end cut where it is wider than `width` pixels."""
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2] + "…"
    return text


def enlargement(size: tuple[int, int]) -> int:
    """The whole number by which an image of (width, height) is enlarged for drawing."""
    return max(1, math.ceil(READABLE / max(size)))


def _resize(image: Image.Image, scale: float, how=Image.Resampling.BICUBIC) -> Image.Image:
    return image.resize([max(1, round(side * scale)) for side in image.size], how) if scale != 1 else image.copy()


def draw_instances(
    image: Image.Image, found: Instances, names: Sequence[str], scale: float | None = None
) -> Image.Image:
    """A copy of an RGB image, `scale` times as large, with masks, boxes, class names and scores.

    Without `scale` a small image is enlarged by `enlargement`.
    """
    scale = scale or enlargement(image.size)
    picture = _resize(image, scale)
    draw = ImageDraw.Draw(picture)
    line = max(1, round(text_size(picture.size) / 8))
    (width, height), sides = picture.size, (found.boxes * scale).round().astype(int)
    sides = [(max(0, a), max(0, b), min(width, c), min(height, d)) for a, b, c, d in sides.tolist()]
    by_area = sorted(range(len(sides)), key=lambda i: -(sides[i][2] - sides[i][0]) * (sides[i][3] - sides[i][1]))
    for i in by_area:  # small ones over large ones
        if found.masks is not None:
            _paint_mask(picture, found.masks[i], colour_of(int(found.labels[i])), line)
    for i in by_area:
        left, top, right, bottom = sides[i]
        corners = (left, top, max(left, right - 1), max(top, bottom - 1))
        draw.rectangle(corners, outline=colour_of(int(found.labels[i])), width=line)
    taken: list[tuple[int, int, int, int]] = []
    for i, label in enumerate(found.labels.tolist()):
        score = "" if found.scores is None else f" {found.scores[i]:.2f}"
        taken.append(_write_label(draw, picture.size, sides[i], name_of(names, label) + score, label, taken))
    return picture


def _paint_mask(picture: Image.Image, mask: np.ndarray, colour: tuple[int, int, int], line: int) -> None:
    whole = Image.fromarray(mask.astype(np.uint8) * 255).resize(picture.size, Image.Resampling.NEAREST)
    if (box := whole.getbbox()) is None:
        return
    left, top, right, bottom = box
    part = whole.crop((left - line, top - line, right + line, bottom + line))  # zeros around, for the outline
    outline = ImageChops.subtract(part, part.filter(ImageFilter.MinFilter(2 * line + 1)))
    for shape in (part.point(lambda value: value * FILL), outline):
        picture.paste(colour, (left - line, top - line), shape)


def _write_label(draw, size, box, text: str, label: int, taken: list) -> tuple[int, int, int, int]:
    """Write a label at the corner of its box where it stays in the picture and hides least; the place it took."""
    points = text_size(size)
    while points > 9 and font_of(points).getlength(text) > 0.9 * size[0]:
        points -= 1
    font, pad = font_of(points), max(2, points // 5)
    text = shorten(text, font, 0.9 * size[0])
    width, height = math.ceil(font.getlength(text)) + 2 * pad, sum(font.getmetrics()) + pad
    left, top, right, bottom = box
    places = [(x, y) for y in (top - height, top, bottom, bottom - height) for x in (left, right - width)]
    places = [(max(0, min(x, size[0] - width)), max(0, min(y, size[1] - height))) for x, y in places]

    def hidden(place: tuple[int, int]) -> int:
        x, y = place
        wide = [min(x + width, right) - max(x, left) for left, _, right, _ in taken]
        high = [min(y + height, bottom) - max(y, top) for _, top, _, bottom in taken]
        return sum(max(0, w) * max(0, h) for w, h in zip(wide, high, strict=True))

    x, y = min(places, key=hidden)
    colour = colour_of(label)
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
    light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
    draw.text((x + pad, y + pad // 2), text, font=font, fill="black" if light else "white")
    return x, y, x + width, y + height


def draw_classes(image: Image.Image, classes: np.ndarray, count: int, scale: float | None = None) -> Image.Image:
    """A copy of an RGB image, coloured by class; of `classes`, (H, W), what is not in 0..count - 1 stays plain."""
    scale = scale or enlargement(image.size)
    colours = np.array([colour_of(label) for label in range(count)], np.uint8).reshape(-1, 3)
    known = (classes >= 0) & (classes < count)
    # Borders between classes in full colour, as neighbours may look alike when blended with the image.
    border = np.zeros_like(known)
    border[:, 1:] |= classes[:, 1:] != classes[:, :-1]
    border[1:] |= classes[1:] != classes[:-1]
    opacity = np.where(known, np.where(border, 1.0, MAP_FILL), 0.0)
    paint = Image.fromarray(colours[np.where(known, classes, 0)])
    picture = _resize(image, scale)
    shape = Image.fromarray((255 * opacity).astype(np.uint8)).resize(picture.size, Image.Resampling.NEAREST)
    picture.paste(paint.resize(picture.size, Image.Resampling.NEAREST), (0, 0), shape)
    return picture


def shares_of(classes: np.ndarray, count: int) -> dict[int, float]:
    """label -> its share of the pixels, the largest first."""
    numbers = Counter(classes[(classes >= 0) & (classes < count)].ravel().tolist())
    return {label: number / classes.size for label, number in numbers.most_common()}


def percent(share: float) -> str:
    """A share in words."""
    return f"{share:.0%}" if share >= 0.01 else "< 1%"


def add_legend(picture: Image.Image, shares: dict[int, float], names: Sequence[str]) -> Image.Image:
    """The picture with the colours, names and shares of its classes to its right, in as many columns as they need."""
    size = text_size(picture.size)
    font, row = font_of(size), round(1.6 * size)
    lines = [(colour_of(label), f"{name_of(names, label)}  {percent(share)}") for label, share in shares.items()]
    per_column = max(1, (picture.height - size) // row)
    columns = [lines[start : start + per_column] for start in range(0, len(lines), per_column)]
    widths = [math.ceil(max(font.getlength(text) for _, text in column)) + round(2.8 * size) for column in columns]
    whole = Image.new("RGB", (picture.width + sum(widths), max(picture.height, row + size)), "white")
    whole.paste(picture)
    draw, left = ImageDraw.Draw(whole), picture.width
    for column, width in zip(columns, widths, strict=True):
        for place, (colour, text) in enumerate(column):
            x, y = left + size // 2, size // 2 + place * row
            draw.rectangle((x, y, x + size, y + size), fill=colour, outline="black")
            draw.text((x + round(1.5 * size), y + size // 2), text, font=font, fill="black", anchor="lm")
        left += width
    return whole


# Predicting


def class_names(cfg: Config, weights: str) -> list[str]:
    """Names of the classes: those the checkpoint was trained on, else the config's, else its data set's own."""
    if told := checkpoints.classes_of(checkpoints.read_file(weights)):
        return told
    meta = _dataset_class(cfg, cfg.val_dataset.type)._load_metainfo(cfg.val_dataset.get("metainfo"))
    return list(meta.get("classes", ()))


def _dataset_class(cfg: Config, name: str) -> type:
    with DATASETS.switch_scope_and_registry(cfg.default_scope) as registry:
        if (found := registry.get(name)) is None:
            raise UserError(f"val_dataset: unknown type {name!r}")
        return found


def category_ids(cfg: Config, names: Sequence[str]) -> tuple[list[int], str]:
    """The category id of each label, and in words where it is from.

    Ids are those of the config's validation annotations where that file is there and names the classes; else COCO's own
    (1 to 90) where the classes are COCO's 80; else label + 1.
    """
    data = cfg.val_dataset
    file = Path(data.get("data_root") or "") / (data.get("ann_file") or "")
    if file.is_file() and file.suffix == ".json":
        ids = {category["name"]: category["id"] for category in json.loads(file.read_text())["categories"]}
        if names and all(name in ids for name in names):
            return [ids[name] for name in names], f"as in {file}"
    if cfg.default_scope == "mmdet" and tuple(names) == _dataset_class(cfg, "CocoDataset").METAINFO["classes"]:
        return COCO_IDS, "COCO's, 1 to 90"
    return list(range(1, len(names) + 1)), "label + 1"


def build_pipeline(cfg: Config) -> list[Callable[[dict], dict]]:
    """The transforms of the config's `test_pipeline`, without what reads annotations."""
    steps = [step for step in cfg.test_pipeline if not step["type"].endswith("Annotations")]
    return [build(step, TRANSFORMS, f"test_pipeline, {step['type']}") for step in steps]


@torch.no_grad()
def predict(model: nn.Module, pipeline: Iterable[Callable[[dict], dict]], path: str) -> tuple[Image.Image, Any]:
    """An image as the pipeline read it, turned as its camera says, and the model's data sample of it."""
    width, height = load_image(path).size  # raises for a truncated file, of which OpenCV reads a part
    image, data = None, {"img_path": path, "img_id": 0}
    try:
        for step in pipeline:
            data = step(data)
            if image is None and "img" in data:
                image = to_picture(data["img"])
        batch = pseudo_collate([data])
    except Exception as error:  # OpenCV and the transforms raise many types
        told = f"OpenCV needs {error.err}" if isinstance(error, cv2.error) else " ".join(str(error).split())[:200]
        raise UserError(f"cannot prepare image {path} of {width} x {height} pixels: {told}") from None
    try:
        return image, model.test_step(batch)[0]
    except torch.cuda.OutOfMemoryError:
        raise UserError(f"out of GPU memory for image {path}: give --device cpu") from None
    except (RuntimeError, ValueError, AssertionError) as error:
        told = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"cannot predict image {path} of {width} x {height} pixels: {told}") from None


def to_picture(bgr: np.ndarray) -> Image.Image:
    """Pixels (H, W, 3) as mm's pipelines hold them, blue first, as an image."""
    return Image.fromarray(np.ascontiguousarray(bgr[..., ::-1]).clip(0, 255).astype(np.uint8))


def encode(mask: np.ndarray) -> dict:
    """A mask (H, W) in COCO's compressed run lengths, as JSON takes them."""
    try:
        from pycocotools import mask as coco
    except ImportError:
        raise UserError(f"pycocotools is missing: install it with {to_install('all')}") from None
    code = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in code["size"]], "counts": code["counts"].decode()}


def coco_results(path: str, found: Instances, ids: Sequence[int]) -> list[dict]:
    """Objects of an image as COCO results; `image_id` is its path, as the path's number in a data set is not known."""
    results = []
    for i, (left, top, right, bottom) in enumerate(found.boxes.tolist()):
        results.append(
            {
                "image_id": path,
                "file_name": Path(path).name,
                "category_id": ids[found.labels[i]] if found.labels[i] < len(ids) else int(found.labels[i]) + 1,
                "bbox": [round(side, 3) for side in (left, top, right - left, bottom - top)],
                "score": round(float(found.scores[i]), 6),
            }
        )
        if found.masks is not None:
            results[-1]["segmentation"] = encode(found.masks[i])
    return results


def class_results(path: str, classes: np.ndarray, ids: Sequence[int]) -> list[dict]:
    """A class map (H, W) as COCO's results of "stuff": one mask for each class in it."""
    return [
        {
            "image_id": path,
            "file_name": Path(path).name,
            "category_id": ids[label],
            "segmentation": encode(classes == label),
        }
        for label in shares_of(classes, len(ids))
    ]
