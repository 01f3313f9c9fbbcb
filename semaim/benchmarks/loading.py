"""Images per second of the loader, against Pillow and torchvision's v1 transforms."""

import os
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader

from semaim.benchmarks.baselines import PlainImages
from semaim.benchmarks.measuring import alternate
from semaim.benchmarks.pretraining import Setting, our_step
from semaim.benchmarks.rows import Row, without_gpu
from semaim.data.folder import EndlessBatches, PretrainImages, ResumableBatches, seed_of
from semaim.engine.network import NormaliseImages
from semaim.errors import UserError

#: Mean difference of a pixel from the baseline's, in levels of 256: the filter is the same, the rounding is not.
PIXEL_TOLERANCE = 0.5


def write_textures(folder: Path, count: int = 200, size: tuple[int, int] = (500, 375), quality: int = 92) -> None:
    """Write JPEGs of smooth shapes and fine grain, with about the bytes (90 kB) and decoding time of photographs.

    Args:
        folder: for the files.
        count, size: number of images, and their (width, height) in pixels.
        quality: of the JPEG.
    """
    generator = np.random.default_rng(0)
    for index in range(count):
        layers = []
        for cells, weight in ((6, 1.0), (24, 0.5), (100, 0.25)):
            noise = generator.integers(0, 256, (cells * size[1] // size[0], cells, 3), dtype=np.uint8)
            layers.append(weight * np.asarray(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC), float))
        grain = generator.normal(0, 24, (size[1], size[0], 3))
        pixels = (sum(layers) / 1.75 + grain).clip(0, 255).astype(np.uint8)
        picture = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(0.6))
        picture.save(folder / f"{index:03}.jpg", quality=quality)


def check_pixels(ours: PretrainImages, plain: PlainImages, count: int = 16) -> float:
    """Mean difference of pixels in levels of 256, with the same random numbers; `UserError` above the tolerance."""
    normalise = NormaliseImages()
    total = 0.0
    for index in range(min(count, len(ours))):
        image = normalise.denormalise(normalise.normalise(ours[0, index]["image"]))
        torch.default_generator.manual_seed(seed_of(ours.seed, 0, index))
        total += (image - normalise.denormalise(plain[index])).abs().mean().item() * 255
    difference = total / min(count, len(ours))
    if not difference <= PIXEL_TOLERANCE:
        raise UserError(f"crops of ours and of the baseline differ by {difference:.2f} levels in the mean: not timed")
    return difference


def load_all(loader: DataLoader) -> None:
    """Load every batch."""
    deque(loader, maxlen=0)


def loader(data: str | None = None, img_size: int = 224, batch: int = 32, workers: int = 2, repeats: int = 5) -> list:
    """Images per second, first in the process itself on one core, then with workers.

    Ours returns uint8 crops, which are normalised on the training device; the baseline's workers normalise.

    Args:
        data: folder of images; if None, textures of 500 x 375 pixels are written to a temporary folder.
        img_size: side of the crops in pixels.
        batch: images per batch.
        workers: processes of the second row; 0 for no such row.
        repeats: turns that are measured.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            if data is None:
                write_textures(Path(folder))
            return _rows(data or folder, data is None, img_size, batch, workers, repeats)
    finally:
        torch.set_num_threads(threads)


def _rows(root: str, textures: bool, img_size: int, batch: int, workers: int, repeats: int) -> list[Row]:
    ours, plain = PretrainImages(root, img_size), PlainImages(root, img_size)
    batch = min(batch, len(ours))
    sizes = [Image.open(path).size for path in plain.paths[:200]]
    width, height = (sum(side) / len(sizes) for side in zip(*sizes, strict=True))
    details = {
        "data": "noise textures, quality 92" if textures else root,
        "images": len(ours),
        "mean_size": [round(width), round(height)],
        "mean_bytes": round(sum(os.path.getsize(path) for path in plain.paths[:200]) / len(sizes)),
        "batch": batch,
        "pixel_difference": check_pixels(ours, plain),
        "repeats": repeats,
    }
    source = "textures" if textures else "images"
    rows = []
    for count in dict.fromkeys((0, workers)):
        common: dict[str, Any] = {"num_workers": count, "persistent_workers": count > 0}
        loaders = [
            DataLoader(ours, batch_sampler=ResumableBatches(len(ours), batch), **common),
            DataLoader(plain, batch, shuffle=True, drop_last=True, **common),
        ]
        passes = [lambda one=one: load_all(one) for one in loaders]
        timing = alternate(passes[0], passes[1], torch.device("cpu"), repeats)
        seen = len(ours) // batch * batch
        cores = max(1, min(count, os.cpu_count() or 1))
        rows.append(
            Row(
                f"loader, {source} of {width:.0f} x {height:.0f} to {img_size}, "
                + (f"{count} workers" if count else "in the process"),
                "CPU", "images/s per core", 2.0, ours=seen / timing.ours / cores,
                baseline=seen / timing.baseline / cores, ratio=timing.ratio, spread=timing.spread, details=details,
            )
        )  # fmt: skip
    if not torch.cuda.is_available():
        what = "share of time waiting for data, ViT-base pretraining with 16 cores"
        return rows + [without_gpu(what, "", 0.05, at_least=False, of_ours=True)]
    return rows + [waiting(ours, details)]


def waiting(images: PretrainImages, details: dict, batch: int = 256, steps: int = 20) -> Row:
    """Share of the time that ViT-B's training step on a GPU waits for the loader, with a worker on each core."""
    batch, workers = min(batch, len(images)), os.cpu_count() or 1
    setting = Setting("base", batch, images.img_size, device="cuda", precision="bf16")
    model, pixels, draw = setting.build()
    step, normalise = our_step(model, pixels, draw, "bf16"), NormaliseImages().cuda()
    sampler = EndlessBatches(len(images), batch)
    batches = iter(DataLoader(images, batch_sampler=sampler, num_workers=workers, pin_memory=True))
    waited = total = 0.0
    for turn in range(steps + 5):
        start = time.perf_counter()
        found = next(batches)
        ready = time.perf_counter()
        pixels.copy_(normalise.normalise(found["image"].cuda(non_blocking=True)))
        draw.copy_(found["draw"], non_blocking=True)
        step()
        torch.cuda.synchronize()
        if turn >= 5:  # after the workers have started
            waited, total = waited + ready - start, total + time.perf_counter() - start
    return Row(
        f"share of time waiting for data, ViT-base pretraining with {workers} cores", "GPU", "",
        0.05 if workers <= 16 else None, at_least=False, of_ours=True, ours=waited / total,
        details={**details, "batch": batch, "images_per_second": steps * batch / total},
    )  # fmt: skip
