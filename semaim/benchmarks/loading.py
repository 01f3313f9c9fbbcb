"""Images per second of the loader, against Pillow and torchvision's v1 transforms."""

import copy
import io
import math
import os
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader
from torchvision.transforms import RandomResizedCrop

from semaim.benchmarks.baselines import PlainImages
from semaim.benchmarks.measuring import alternate
from semaim.benchmarks.other_loaders import OTHERS, Passes, installed, write_shards
from semaim.benchmarks.pretraining import Setting, our_step
from semaim.benchmarks.rows import Row, without_gpu
from semaim.data.copying import shrink
from semaim.data.decoding import decode_image
from semaim.data.folder import EndlessBatches, PretrainImages, ResumableBatches, name_of, seed_of
from semaim.data.seeding import seeded
from semaim.data.shards import inner_name, read_bytes
from semaim.engine.network import NormaliseImages
from semaim.errors import UserError

#: Mean difference of a pixel from the baseline's, in levels of 256: the filter is the same, the rounding is not.
PIXEL_TOLERANCE = 0.5
BATCHES = 4  #: of a pass for each worker, at least: images are repeated if they are too few, or workers would wait


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


def passes(images: PretrainImages | PlainImages, batch: int, workers: int, times: int) -> Passes:
    """Passes over shuffled images, with each image so many times."""
    images = copy.copy(images)
    common: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
    if isinstance(images, PretrainImages):
        images.paths = np.tile(images.paths, times)
        loader = DataLoader(images, batch_sampler=ResumableBatches(len(images), batch), **common)
    else:
        images.paths = times * images.paths
        loader = DataLoader(images, batch, shuffle=True, drop_last=True, **common)
    return Passes(loader, len(images) // batch * batch)


def load_all(loader: Iterable) -> None:
    """Load every batch."""
    deque(loader, maxlen=0)


def copy_differences(
    paths: list[str], copies: list[str], img_size: int, count: int = 200
) -> tuple[float, float, float]:
    """Crops of copies against crops of the same regions of their originals, by Pillow, which crops parts of pixels.

    Args:
        paths, copies: of the originals and of their copies, in the same order.
        img_size: side of the crops in pixels.
        count: images, spread over all.

    Returns:
        The mean difference of their pixels in levels of 256, and the shares of crops that are enlarged along a side:
        of the copies, and of the originals.
    """
    places = np.linspace(0, len(paths) - 1, min(count, len(paths))).round().astype(int)
    differences, enlarged = [], np.zeros(2)
    for place in places:
        images = [decode_image(read_bytes(path), path) for path in (copies[place], paths[place])]
        with seeded(0, int(place)):
            top, left, height, width = RandomResizedCrop.get_params(images[1], [0.2, 1.0], [3 / 4, 4 / 3])
        crops = []
        for number, image in enumerate(images):
            x, y = (one / other for one, other in zip(image.size, images[1].size, strict=True))
            box = left * x, top * y, (left + width) * x, (top + height) * y
            crops.append(np.asarray(image.resize((img_size, img_size), Image.Resampling.BICUBIC, box=box), np.float32))
            enlarged[number] += min(width * x, height * y) < img_size
        differences.append(np.abs(crops[0] - crops[1]).mean())
    return float(np.mean(differences)), *(enlarged / len(places)).tolist()


def loader(
    data: str | None = None,
    img_size: int = 224,
    batch: int = 32,
    workers: int = 2,
    repeats: int = 5,
    copies: Sequence[int] = (),
) -> list[Row]:
    """Images per second per core, first in the process itself, then with workers, against each baseline.

    Ours returns uint8 crops, which are normalised on the training device. The plain loader's workers normalise; a
    second one returns uint8 as ours, which shows how much of the ratio that is.

    Args:
        data: folder of images; if None, textures of 500 x 375 pixels are written to a temporary folder.
        img_size: side of the crops in pixels.
        batch: images per batch.
        workers: processes of the second rows; 0 for no such rows.
        repeats: turns that are measured.
        copies: short sides in pixels, see `semaim.data.copying`: ours on such a copy against ours on the originals.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            root = data
            if root is None:
                root = os.path.join(folder, "textures")
                os.mkdir(root)
                write_textures(Path(root))
            return _rows(root, Path(folder), data is None, img_size, batch, workers, repeats, copies)
    finally:
        torch.set_num_threads(threads)


def _rows(
    root: str,
    folder: Path,
    textures: bool,
    img_size: int,
    batch: int,
    workers: int,
    repeats: int,
    copies: Sequence[int],
) -> list[Row]:
    ours, plain = PretrainImages(root, img_size), PlainImages(root, img_size)
    batch = min(batch, len(ours))
    looked_at = [read_bytes(path) for path in plain.paths[:200]]
    sizes = [Image.open(io.BytesIO(data)).size for data in looked_at]
    width, height = (sum(side) / len(sizes) for side in zip(*sizes, strict=True))
    details = {
        "data": "noise textures, quality 92" if textures else root,
        "images": len(ours),
        "mean_size": [round(width), round(height)],
        "mean_bytes": round(sum(map(len, looked_at)) / len(sizes)),
        "batch": batch,
        "pixel_difference": check_pixels(ours, plain),
        "repeats": repeats,
    }
    what = f"loader, {'textures' if textures else 'images'} of {width:.0f} x {height:.0f} to {img_size}, "
    unnormalised = PlainImages(root, img_size, floats=False)
    smaller = {side: _copy(root, folder / str(side), side, img_size, ours) for side in copies}
    rows = []
    for count in dict.fromkeys((0, workers)):
        cores = max(1, min(count, os.cpu_count() or 1))
        where = f"{count} workers" if count else "in the process"
        times = math.ceil(BATCHES * batch * count / len(ours)) or 1
        shards = write_shards(times * plain.paths, folder / f"shards{count}", 4 * max(1, count))
        first = passes(ours, batch, count, times)
        given: dict[str, Any] = {"cores": cores, "repeats": repeats, "details": details}
        rows.append(compared(what + where, first, passes(plain, batch, count, times), target=2.0, **given))
        text = f"the same, plain loader's crops uint8 too, {where}"
        rows.append(compared(text, first, passes(unnormalised, batch, count, times), **given))
        for name, packages, make in OTHERS:
            found, other = installed(packages), None
            reason = f"{packages[0]} is not installed"
            try:
                other = make(shards, times * len(ours), img_size, batch, count) if found else None
            except (ImportError, RuntimeError) as error:  # such as a library that is missing beside the package
                reason = " ".join(str(error).split())[:80]
            text = f"the same against {name}{f' {found}' if found else ''}, {where}"
            missing = Row(text, "CPU", "images/s per core", details={"reason": reason})
            rows.append(compared(text, first, other, **given) if other else missing)
        for side, small in smaller.items():
            more = {**given, "details": {**details, **small.details}}
            text = f"ours on a copy of short side {side}, against ours on its originals, {where}"
            rows.append(compared(text, passes(small.images, batch, count, times), first, **more))
    for side, small in smaller.items():
        about, text = small.details, f"copy of short side {side}: "
        rows += [
            Row(f"{text}size", "CPU", "MB", ours=about["mb"], baseline=about["mb_of_originals"], details=about),
            Row(f"{text}mean difference of crops", "CPU", "levels of 256", ours=about["difference"], details=about),
            Row(
                f"{text}share of crops that are enlarged", "CPU", "", ours=about["enlarged"],
                baseline=about["enlarged_of_originals"], details=about,
            ),
        ]  # fmt: skip
    if not torch.cuda.is_available():
        what = "share of time waiting for data, ViT-base pretraining with 16 cores"
        return rows + [without_gpu(what, "", 0.05, at_least=False, of_ours=True)]
    return rows + [waiting(ours, details)]


def compared(
    what: str, ours: Passes, baseline: Passes, cores: int, repeats: int, details: dict, target: float | None = None
) -> Row:
    """A row of images per second and core of two loaders, alternately timed."""
    passes = [lambda one=one: load_all(one.loader) for one in (ours, baseline)]
    timing = alternate(passes[0], passes[1], torch.device("cpu"), repeats)
    scale = ours.images / baseline.images  # a loader may leave out the last images, which fill no batch
    low, high = timing.spread
    return Row(
        what, "CPU", "images/s per core", target, ours=ours.images / timing.ours / cores,
        baseline=baseline.images / timing.baseline / cores, ratio=timing.ratio * scale,
        spread=(low * scale, high * scale), details=details,
    )  # fmt: skip


class Smaller(NamedTuple):
    """A copy with smaller images, and what it changes."""

    images: PretrainImages
    details: dict[str, Any]


def _copy(root: str, target: Path, side: int, img_size: int, originals: PretrainImages) -> Smaller:
    report = shrink(root, target, side)
    if report.problems:
        raise UserError(f"the copy of {root} is not what it should be:\n{report}")
    images = PretrainImages(str(target), img_size)
    before, after = ([os.fsdecode(path) for path in data.paths] for data in (originals, images))
    by_name = {inner_name(path): path for path in after}
    names = [name_of(path, root) for path in before]
    pairs = [by_name.get(name) or by_name[f"{name}.jpg"] for name in names]  # the latter of what was no JPEG
    difference, *enlarged = copy_differences(before, pairs, img_size)
    size, size_before = (sum(len(read_bytes(path)) for path in paths) / 1e6 for paths in (after, before))
    details = {"side": side, "mb": size, "mb_of_originals": size_before, "difference": difference}
    return Smaller(images, {**details, "enlarged": enlarged[0], "enlarged_of_originals": enlarged[1]})


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
