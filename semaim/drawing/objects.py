"""Objects and classes drawn on images: masks, boxes, labels, class maps, legends, and pictures side by side."""

import colorsys
import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

Pair = tuple[Image.Image, Image.Image, str]  #: two pictures of the same size, and a caption

READABLE = 480  #: pictures with a shorter long side, in pixels, are enlarged so that text fits on them
FILL, MAP_FILL = 0.45, 0.6  #: opacity of masks, and of class maps, which have no outlines or labels


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
        """The objects with a score of at least `threshold`."""
        assert self.scores is not None, "annotated objects have no scores"
        kept = self.scores >= threshold
        masks = None if self.masks is None else self.masks[kept]
        return Instances(self.boxes[kept], self.labels[kept], self.scores[kept], masks)


# Colours, names, text


_palette: list[tuple[int, int, int]] = []


def use_palette(colours: Sequence[Sequence[int]] | None) -> None:
    """Draw classes in these colours, red, green, blue of 0 to 255, from now on; None for the default ones."""
    _palette[:] = [(red, green, blue) for red, green, blue in colours or ()]


def colour_of(label: int) -> tuple[int, int, int]:
    """The colour of a class, the same in every picture: of the data set's palette, if it has one."""
    return _palette[label] if label < len(_palette) else default_colour(label)


def default_colour(label: int) -> tuple[int, int, int]:
    """A colour that is unlike those of the labels around it."""
    # Hues in steps of the golden ratio nearly repeat after 8, 13 and 21 labels: such labels get different shades.
    saturation, value = ((0.9, 1.0), (0.5, 1.0), (0.85, 0.6), (0.55, 0.8))[label // 8 % 4]
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def name_of(names: Sequence[str], label: int) -> str:
    """A class's name, or its number if there are too few names."""
    return names[label] if label < len(names) else f"class {label}"


@cache
def font_of(size: int) -> ImageFont.FreeTypeFont:
    """A font of `size` pixels."""
    # It comes with matplotlib, so it is always there; unlike Pillow's default font it has Greek and Cyrillic.
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def text_size(size: tuple[int, int]) -> int:
    """Text size in pixels that reads well in a picture of (width, height)."""
    return max(12, round(0.025 * math.sqrt(size[0] * size[1])))


def shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, shortened at its end if it is wider than `width` pixels."""
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2] + "…"
    return text


def enlargement(size: tuple[int, int]) -> int:
    """The integer factor by which an image of (width, height) is enlarged for drawing."""
    return max(1, math.ceil(READABLE / max(size)))


def _resize(image: Image.Image, scale: float, how=Image.Resampling.BICUBIC) -> Image.Image:
    return image.resize([max(1, round(side * scale)) for side in image.size], how) if scale != 1 else image.copy()


# Objects


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
    (width, height), scaled = picture.size, (found.boxes * scale).round().astype(int).tolist()
    sides = [(max(0, a), max(0, b), min(width, c), min(height, d)) for a, b, c, d in scaled]
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
    """Write a label at the corner of its box where it fits in the picture and hides least; returns its rectangle."""
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


# Classes


def draw_classes(image: Image.Image, classes: np.ndarray, count: int, scale: float | None = None) -> Image.Image:
    """A copy of an RGB image, coloured by `classes` (H, W); pixels of classes outside 0..count - 1 stay as they are."""
    scale = scale or enlargement(image.size)
    colours = np.array([colour_of(label) for label in range(count)], np.uint8).reshape(-1, 3)
    known = (classes >= 0) & (classes < count)
    # Borders between classes are opaque, as neighbours may look alike when blended with the image.
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
    """A share as a whole percentage."""
    return f"{share:.0%}" if share >= 0.01 else "< 1%"


def add_legend(picture: Image.Image, shares: dict[int, float], names: Sequence[str]) -> Image.Image:
    """The picture with a legend on its right: colours, names and shares of its classes, in columns as needed."""
    size = text_size(picture.size)
    font, row = font_of(size), round(1.6 * size)
    widest = max(16 * size, picture.width // 2)  # names of several words would be wider than the picture
    texts = {label: shorten(name_of(names, label), font, widest) for label in shares}
    lines = [(colour_of(label), f"{texts[label]}  {percent(share)}") for label, share in shares.items()]
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


# Pictures together


def join_left_to_right(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures joined from left to right, on white."""
    whole = Image.new(
        "RGB", (sum(picture.width for picture in pictures), max(picture.height for picture in pictures)), "white"
    )
    left = 0
    for picture in pictures:
        whole.paste(picture, (left, 0))
        left += picture.width
    return whole


def draw_pairs(pairs: Sequence[Pair], heads: tuple[str, str] = ("annotated", "predicted")) -> Image.Image:
    """Pairs of pictures in rows under two headings, each pair's caption below it."""
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
