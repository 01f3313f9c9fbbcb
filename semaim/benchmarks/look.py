"""How often the centre of the order changes if the order pass runs in bf16 instead of fp32.

    python -m semaim.benchmarks.look CHECKPOINT... --images DIR [--count 400] [--random]

The official code makes the order of pixel targets in fp32, outside of autocast; on a GPU ours runs the pass in
bf16, unless `look_precision="fp32"`. The centre is the patch with the largest similarity, so a small error can move it.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from semaim.checkpoints.files import read_checkpoint
from semaim.data.folder import centre_crops, find_images
from semaim.engine.pretraining import Pretraining, model_from_checkpoint
from semaim.errors import UserError, run
from semaim.models import SemAIM
from semaim.models.ordering import rows_and_columns

#: name of a row -> whether the pass is in bf16, and whether the similarity is, too.
WAYS = {"pass in bf16, similarity in fp32": (True, False), "pass and similarity in bf16": (True, True)}


@torch.no_grad()
def centres(network: SemAIM, images: Tensor, low: bool, similarity_low: bool = False) -> Tensor:
    """The patch with the largest similarity of normalised images (B, 3, H, W): int64 (B,).

    Args:
        low: run the pass under bf16 autocast.
        similarity_low: compute the cosine and its softmax in bf16, too.
    """
    with torch.autocast(images.device.type, torch.bfloat16, enabled=low):
        tokens, similarity = network.look(images)
    if similarity_low:
        unit = torch.nn.functional.normalize(tokens.bfloat16(), dim=-1)
        similarity = (unit[:, :1] * unit[:, 1:]).sum(dim=-1).softmax(dim=-1)
    return similarity.argmax(dim=-1)


def compare(model: Pretraining, images: Tensor, batch: int = 32) -> dict[str, tuple[float, float]]:
    """Share of images uint8 (N, 3, H, W) whose centre differs from fp32's, and how far it then moves, in patches."""
    network = model.network
    if not isinstance(network, SemAIM) or network.look_precision != "same" or network.similarity == "self":
        raise UserError("nothing to compare: it takes a SemAIM with similarity cls or gap and look_precision same")
    device = next(network.parameters()).device
    found: dict[str, list[Tensor]] = {way: [] for way in ("fp32", *WAYS)}
    for part in images.split(batch):
        seen = model.data_preprocessor.normalise(part.to(device))
        found["fp32"].append(centres(network, seen, low=False))
        for way, (low, similarity_low) in WAYS.items():
            found[way].append(centres(network, seen, low, similarity_low))
    row, column = rows_and_columns(network.grid_of(images.shape[-2:]), device)
    right = torch.cat(found.pop("fp32"))
    rows = {}
    for way, parts in found.items():
        ours = torch.cat(parts)
        moved = ours != right
        distance = torch.hypot((row[ours] - row[right]).float(), (column[ours] - column[right]).float())[moved]
        rows[way] = moved.float().mean().item(), distance.mean().item() if moved.any() else 0.0
    return rows


def random_again(model: Pretraining) -> None:
    """Give the network new random weights, as at the start of a run."""
    torch.manual_seed(0)
    for module in reversed(list(model.network.modules())):  # the network's own initialisation comes last
        if hasattr(module, "reset_parameters"):
            cast(Any, module).reset_parameters()


def main() -> int:
    """The command: see --help."""
    parser = argparse.ArgumentParser(prog="python -m semaim.benchmarks.look", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="of pretraining runs")
    parser.add_argument("--images", required=True, metavar="DIR", help="folder of images")
    parser.add_argument("--count", type=int, default=400, metavar="N", help="number of images (default: %(default)s)")
    parser.add_argument("--img-size", type=int, metavar="N", help="side of their centre crops (default: the run's)")
    parser.add_argument("--random", action="store_true", help="first measure random weights of the first one's sizes")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    args = parser.parse_args()
    paths = find_images(args.images)
    places = np.linspace(0, len(paths) - 1, min(args.count, len(paths))).round().astype(int)
    print(f"{'checkpoint':40} {'way':34} {'centre moved':>12} {'by, patches':>12}   of {len(places)} images")
    images = None
    for path in [args.checkpoints[0], *args.checkpoints] if args.random else args.checkpoints:
        model = model_from_checkpoint(read_checkpoint(path)).to(args.device)
        name = str(path)[-40:]
        if images is None:
            size = args.img_size or model.network.grid[0] * model.network.patch_size[0]
            images = centre_crops([paths[place] for place in places], size)
            if args.random:
                random_again(model)
                name = "random weights"
        for way, (share, distance) in compare(model, images).items():
            print(f"{name:40} {way:34} {100 * share:11.2f}% {distance:12.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
