"""Loaders of other libraries: webdataset's, and DALI's with its decoder on the CPU. Both read tar shards.

They crop and flip as ours in distribution, with random numbers of their own, and return uint8 as ours does.
"""

import io
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from semaim.benchmarks.baselines import plain_transform
from semaim.data.shards import read_bytes


class Passes(NamedTuple):
    """What loads all images each time it is iterated, and the number of images that it returns then."""

    loader: Iterable
    images: int


def write_shards(paths: Sequence[str], folder: Path, count: int) -> list[str]:
    """Write images into `count` tar shards in a new folder, or one each if they are fewer; returns their paths."""
    folder.mkdir()
    shards = []
    for start in range(min(count, len(paths))):
        shards.append(str(folder / f"{start:06}.tar"))
        with tarfile.open(shards[-1], "w") as archive:
            for place in range(start, len(paths), count):
                data = read_bytes(paths[place])
                entry = tarfile.TarInfo(f"{place:06}.jpg")  # decoders look at the data; webdataset at the name, too
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    return shards


def webdataset_loader(shards: list[str], count: int, img_size: int, batch: int, workers: int) -> Passes:
    """webdataset's usual pipeline: shuffled, decoded by Pillow, torchvision's v1 transforms."""
    import webdataset

    images = webdataset.WebDataset(shards, shardshuffle=len(shards)).shuffle(1000).decode("pilrgb").to_tuple("jpg")
    images = images.map_tuple(plain_transform(img_size, floats=False)).batched(batch)
    loader = webdataset.WebLoader(images, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    return Passes(loader, count)


def dali_loader(shards: list[str], count: int, img_size: int, batch: int, workers: int) -> Passes:
    """DALI on the CPU: it decodes only the crop. Its threads take the place of workers, one for none.

    A batch is made when it is asked for: batches made ahead, at the end of a pass, would be work in another's time.
    """
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=batch, num_threads=max(1, workers), device_id=None, exec_async=False, exec_pipelined=False)
    def crops():
        files = fn.readers.webdataset(paths=shards, ext=["jpg"], random_shuffle=True, initial_fill=1000, name="images")
        sizes = {"random_area": [0.2, 1.0], "random_aspect_ratio": [3 / 4, 4 / 3]}
        images = fn.decoders.image_random_crop(files, device="cpu", output_type=types.RGB, **sizes)
        images = fn.resize(images, size=[img_size, img_size], interp_type=types.INTERP_CUBIC, antialias=True)
        return fn.flip(images, horizontal=fn.random.coin_flip())

    return Passes(Batches(crops(), count // batch), count // batch * batch)


class Batches:
    """Passes over a DALI pipeline, of so many batches each: uint8 (B, S, S, 3). Images left over wait for the next."""

    def __init__(self, pipeline: Any, count: int):
        self.pipeline, self.count = pipeline, count
        pipeline.build()

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.count):
            (images,) = self.pipeline.run()
            yield torch.from_dlpack(images.as_tensor()).clone()


#: Name in the table, packages that have it, and what makes its loader.
OTHERS: tuple[tuple[str, tuple[str, ...], Callable[[list[str], int, int, int, int], Passes]], ...] = (
    ("webdataset", ("webdataset",), webdataset_loader),
    ("DALI (CPU)", ("nvidia-dali-cuda130", "nvidia-dali-cuda120"), dali_loader),
)


def installed(packages: Sequence[str]) -> str | None:
    """The version of the first of these packages that is installed, or None."""
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None
