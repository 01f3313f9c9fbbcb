"""Names and shares as bars on the right of a picture, in a column whose size does not depend on the shares."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw

from semaim.drawing.objects import font_of, percent, shorten, text_size

RAIL = (232, 232, 232)  #: colour of a whole bar's length


class Bar(NamedTuple):
    """A line of text with a bar below it; the share is from 0 to 1."""

    name: str
    share: float
    colour: tuple[int, int, int]


def shown(name: str) -> str:
    """A name without signs that a font cannot draw, such as line breaks."""
    return "".join(sign if sign.isprintable() else "?" for sign in name)


def add_bars(picture: Image.Image, bars: Sequence[Bar], names: Iterable[str] = (), least: int = 1) -> Image.Image:
    """The picture with a white column on its right: each name with its percentage, and a bar of that length.

    Bars below the picture's lower edge are left out, but `least` fit always: white is added below the picture.

    Args:
        picture: RGB.
        bars: the first at the top.
        names: whose widest the column is wide enough for, for pictures that need one size; empty for those of the bars.
        least: number of bars that are drawn.
    """
    size = text_size(picture.size)
    bars = [bar._replace(name=shown(bar.name)) for bar in bars]
    font, pad, row = font_of(size), round(0.7 * size), round(2.5 * size)
    number = math.ceil(font.getlength("100%")) + pad
    widest = max((font.getlength(name) for name in (tuple(map(shown, names)) or [bar.name for bar in bars])), default=0)
    width = min(math.ceil(widest) + number, max(16 * size, round(0.5 * picture.width)))
    height = max(picture.height, least * row + pad)
    whole = Image.new("RGB", (picture.width + width + 2 * pad, height), "white")
    whole.paste(picture)
    draw, left = ImageDraw.Draw(whole), picture.width + pad
    for place, bar in enumerate(bars[: (height - pad) // row]):
        top = pad + place * row
        draw.text((left, top), shorten(bar.name, font, width - number), font=font, fill="black")
        draw.text((left + width, top), percent(bar.share), font=font, fill="black", anchor="ra")
        above, below = top + round(1.4 * size), top + round(1.9 * size)
        draw.rectangle((left, above, left + width - 1, below), fill=RAIL)
        if (length := round(bar.share * width)) > 0:
            draw.rectangle((left, above, left + length - 1, below), fill=bar.colour)
    return whole
