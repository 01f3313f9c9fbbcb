"""How often the centre of the order lies on an object, measured on built-in scenes, whose masks are exact.

    python -m semaim.benchmarks.centres CHECKPOINT... --scenes DIR [--count 400] [--random] [--out FILE.json]

The centre is the patch with the largest similarity. Two figures are given for comparison with the share of images
where it lies on an object: chance, the mean share of patches on objects, and the best fixed place, the patch that is on
an object most often. An order that ignores the image could start there.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from semaim.benchmarks.look import random_again
from semaim.checkpoints.files import read_checkpoint
from semaim.data.folder import centre_crops
from semaim.engine.pretraining import Pretraining, model_from_checkpoint
from semaim.errors import UserError, run, writing
from semaim.models import SemAIM
from semaim.models.ordering import SEMANTIC_ORDERS, Grid

SOURCES = ("cls", "gap", "self")  #: what patches may be compared with, as `SemAIM.similarity`
COLUMNS = {"on_object": "on object", "chance": "chance", "best_fixed": "best fixed", "entropy": "entropy"}


def on_objects(files: Sequence[Path], grid: Grid, background: int) -> Tensor:
    """Which patches lie on objects, with half of their area or more: semantic maps -> bool (N, L).

    0 is unlabelled, the largest value background; `UserError` for a map that is not square, as its image is cropped.
    """
    rows = []
    for file in files:
        try:
            with Image.open(file) as image:
                classes = np.asarray(image)
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror or error}") from None
        if classes.ndim != 2 or classes.shape[0] != classes.shape[1]:
            raise UserError(f"{file} is not a square map of classes: give --scenes a folder of built-in scenes")
        objects = Image.fromarray(((classes != 0) & (classes != background)).astype(np.float32))
        rows.append(np.asarray(objects.resize(grid[::-1], Image.Resampling.BOX)).ravel())
    return torch.from_numpy(np.stack(rows)) >= 0.5 - 1e-6  # for rounding in the mean


@torch.no_grad()
def similarities_of(model: Pretraining, images: Tensor, batch: int = 64) -> dict[str, Tensor]:
    """Similarity maps (N, L) of uint8 images (N, 3, H, W): the one that the model's order uses first, then the others.

    With a teacher as guide there is no "self", as its attention is not known.
    """
    network = model.network
    if not isinstance(network, SemAIM):
        raise UserError(f"{type(network).__name__} predicts in no order: there is no centre")
    device, used = next(network.parameters()).device, network.similarity
    known = [used, *(source for source in SOURCES if source != used)]
    if not isinstance(network.guide, str):
        known.remove("self")
    found: dict[str, list[Tensor]] = {source: [] for source in known}
    network.eval()
    try:
        for part in images.split(batch):
            seen = model.data_preprocessor.normalise(part.to(device))
            for source in known:
                network.similarity = source
                found[source].append(network.look(seen)[1].float().cpu())
    finally:
        network.similarity = used
    return {source: torch.cat(parts) for source, parts in found.items()}


def measure(similarity: Tensor, objects: Tensor) -> dict[str, float]:
    """Figures of similarity maps (N, L), given which patches lie on objects, bool (N, L).

    Returns:
        images: N.
        on_object: share of images whose centre lies on an object.
        chance: mean share of patches on objects.
        best_fixed, best_place: the patch that most often lies on an object: in which share of images, and its index.
        places: number of patches that are the centre of some image.
        entropy: mean entropy of the maps, scaled to sum 1, divided by log L: 1 if all patches are equal.
        rank_difference: mean rank of patches on objects minus that of the others, ranks from 0 for the lowest
            similarity to 1 for the highest; mean over the images that have both, None without any.
    """
    images, patches = similarity.shape
    centre = similarity.argmax(dim=-1)
    often = objects.float().mean(dim=0)
    share = similarity.double() / similarity.double().sum(dim=-1, keepdim=True)
    entropy = torch.special.entr(share).sum(dim=-1) / math.log(patches)
    rank = similarity.argsort(dim=-1).argsort(dim=-1).double() / (patches - 1)
    both = objects.any(dim=-1) & ~objects.all(dim=-1)
    on, off = objects[both], ~objects[both]
    apart = (rank[both] * on).sum(dim=-1) / on.sum(dim=-1) - (rank[both] * off).sum(dim=-1) / off.sum(dim=-1)
    return {
        "images": images,
        "on_object": objects.gather(1, centre[:, None]).float().mean().item(),
        "chance": objects.float().mean().item(),
        "best_fixed": often.max().item(),
        "best_place": often.argmax().item(),
        "places": len(centre.unique()),
        "entropy": entropy.mean().item(),
        "rank_difference": apart.mean().item() if both.any() else None,
    }


def scenes_of(folder: Path, count: int) -> tuple[list[Path], list[Path], int]:
    """Evenly spaced validation images of built-in scenes, their semantic maps, and the maps' background value."""
    try:
        names = (folder / "ade/objectInfo.txt").read_text(encoding="utf-8").splitlines()[1:]
        background = max(int(line.split("\t")[0]) for line in names)
    except (OSError, ValueError):
        raise UserError(f"{folder} holds no built-in scenes: make some with python -m semaim.data.scenes") from None
    images = sorted((folder / "coco/val2017").glob("*.jpg"))
    if not images or count < 1:
        raise UserError(f"no image in {folder}/coco/val2017" if not images else f"--count {count}: give 1 or more")
    places = np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int)
    images = [images[place] for place in places]
    return images, [folder / "ade/annotations/validation" / f"{image.stem}.png" for image in images], background


def main() -> int:
    """The command: see --help."""
    parser = argparse.ArgumentParser(prog="python -m semaim.benchmarks.centres", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="of pretraining runs of SemAIM")
    parser.add_argument("--scenes", required=True, type=Path, metavar="DIR", help="folder of built-in scenes")
    parser.add_argument("--count", type=int, default=400, metavar="N", help="validation images (default: %(default)s)")
    parser.add_argument("--random", action="store_true", help="first measure random weights of the first one's sizes")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write all figures there")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    args = parser.parse_args()
    paths, maps, background = scenes_of(args.scenes, args.count)
    print(f"{'checkpoint':40} {'similarity':14}" + "".join(f"{title:>12}" for title in COLUMNS.values()), end="")
    print(f"{'rank apart':>12}{'places':>8}   of {len(paths)} scenes")
    rows = []
    for place, path in enumerate([args.checkpoints[0], *args.checkpoints] if args.random else args.checkpoints):
        model = model_from_checkpoint(read_checkpoint(path)).to(args.device)
        untrained = args.random and place == 0
        if untrained:
            random_again(model)
        height, width = (side * patch for side, patch in zip(model.network.grid, model.network.patch_size, strict=True))
        if height != width:
            raise UserError(f"{path} takes images of {height} x {width} pixels: only square ones are measured")
        images, objects = centre_crops(list(map(str, paths)), height), on_objects(maps, model.network.grid, background)
        used = model.network.similarity if model.network.order in SEMANTIC_ORDERS else None
        for source, similarity in similarities_of(model, images).items():
            found = {"checkpoint": None if untrained else str(path), "similarity": source, "used": source == used}
            rows.append(found | measure(similarity, objects))
            name = "random weights" if untrained else str(path)[-40:]
            print(f"{name:40} {source + ' (used)' * (source == used):14}", end="")
            print("".join(f"{rows[-1][key]:12.3f}" for key in COLUMNS), end="")
            apart = rows[-1]["rank_difference"]
            print(f"{'none' if apart is None else f'{apart:+.3f}':>12}{rows[-1]['places']:8}", flush=True)
    if args.out:
        with writing(args.out):
            args.out.write_text(json.dumps({"scenes": str(args.scenes), "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
