"""What encoders of different families cost in a detector, and what another patch size does to features.

    python -m semaim.benchmarks.encoders cost [ARCH ...] [--img-size 1024] [--batch 1] [--device cuda]
    python -m semaim.benchmarks.encoders patches SOURCE --data-root DIR [--sizes 7 8 9]

`cost`: one step (forward and backward) of a detector's encoder as in mmdet_configs/plain_mask_rcnn.py, with random
weights, and the peak memory. `patches`: k-NN accuracy where the patch projection is resampled to other sizes and the
images to the same grid of patches, as the configs for detection and segmentation do with patches of 14 pixels.
"""

import argparse
import statistics
import sys

import torch
from torch.utils.data import DataLoader

from semaim.benchmarks.measuring import check_device, gpu_peak, seconds
from semaim.data.labelled import LabelledImages
from semaim.encoders.contract import Encoder
from semaim.encoders.networks import PlainViTDet
from semaim.encoders.sources import architecture, open_source
from semaim.engine.features import knn_accuracy
from semaim.errors import run

ARCHS = (
    "vit_base_patch16_224", "vit_base_patch14_reg4_dinov2", "vit_base_patch16_dinov3", "vit_base_patch16_siglip_224",
    "eva02_base_patch14_224", "beit_base_patch16_224", "samvit_base_patch16",
)  # fmt: skip


def cost(arch: str, img_size: int, batch: int, device: torch.device, turns: int = 5) -> tuple[float, float, int]:
    """Seconds and peak bytes (on a GPU, else nan) of a step, and the side of the windows."""
    network = PlainViTDet(architecture(arch).description, img_size=img_size).to(device)
    images = torch.randn(batch, 3, img_size, img_size, device=device)

    def step() -> None:
        network.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            maps = network(images)
        maps.float().square().mean().backward()

    step()
    taken = statistics.median(seconds(step, device) for _ in range(turns))
    peak = gpu_peak(step, device) if device.type == "cuda" else float("nan")
    return taken, peak, network.window_size


@torch.no_grad()
def features(encoder: Encoder, images: LabelledImages, device: torch.device, pool: str) -> tuple:
    """Features (N, D) and labels (N,) of a data set."""
    parts = [
        (encoder.features(batch["image"].to(device), pool).cpu(), batch["label"])
        for batch in DataLoader(images, batch_size=64)
    ]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def accuracy(source: str, root: str, patch: int, device: torch.device, pool: str, k: int) -> float:
    """k-NN accuracy in percent of an encoder whose patch projection is resampled to `patch` pixels."""
    found = open_source(source)
    own = found.build()
    side = own.grid_of(own.img_size)[0] * patch
    encoder = found.build(patch_size=patch, img_size=(side, side))
    encoder.load(found)
    encoder.to(device).eval()
    statistics_of = found.preparation.statistics
    assert statistics_of is not None
    mean, std = statistics_of.mean, statistics_of.std
    sets = [LabelledImages(root, side, split, "none", mean=mean, std=std, crop_pct=1.0) for split in ("train", "val")]
    bank, queries = (features(encoder, images, device, pool) for images in sets)
    return knn_accuracy(bank[0], bank[1], queries[0], queries[1], len(sets[0].classes), ks=(k,))[k][0]


def main() -> None:
    """Print a row per architecture or patch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    costs = commands.add_parser("cost")
    costs.add_argument("archs", nargs="*", default=ARCHS)
    costs.add_argument("--img-size", type=int, default=1024)
    costs.add_argument("--batch", type=int, default=1)
    patches = commands.add_parser("patches")
    patches.add_argument("source")
    patches.add_argument("--data-root", required=True)
    patches.add_argument("--sizes", type=int, nargs="+", default=(7, 8, 9))
    patches.add_argument("--pool", default="cls")
    patches.add_argument("--k", type=int, default=20)
    for command in (costs, patches):
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = check_device(args.device)
    if args.command == "cost":
        for arch in args.archs:
            taken, peak, window = cost(arch, args.img_size, args.batch, device)
            print(f"{arch:32} windows of {window:2}  {1e3 * taken:8.1f} ms  {peak / 2**30:6.2f} GiB", flush=True)
        return
    for size in args.sizes:
        figure = accuracy(args.source, args.data_root, size, device, args.pool, args.k)
        print(f"patches of {size:2} pixels  k-NN (k = {args.k}) {figure:.2f} %", flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
