"""Loaders of other libraries: webdataset's, and DALI's with its decoder on the CPU. Both read tar shards.

They crop and flip as ours in distribution, with random numbers of their own, and return uint8 as ours does.
"""

import io
import tarfile
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from semaim.benchmarks.baselines import plain_transform
from semaim.data.shards import read_bytes


def write_shards(paths: Sequence[str], folder: Path, count: int) -> list[str]:
    """Write images into `count` tar shards, or one each if they are fewer; returns the paths of the shards."""
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


def webdataset_loader(shards: list[str], img_size: int, batch: int, workers: int) -> Iterable:
    """webdataset's usual pipeline: shuffled, decoded by Pillow, torchvision's v1 transforms."""
    import webdataset

    images = webdataset.WebDataset(shards, shardshuffle=len(shards)).shuffle(1000).decode("pilrgb").to_tuple("jpg")
    images = images.map_tuple(plain_transform(img_size, floats=False)).batched(batch)
    return webdataset.WebLoader(images, batch_size=None, num_workers=workers, persistent_workers=workers > 0)


def dali_loader(shards: list[str], img_size: int, batch: int, workers: int) -> Iterable:
    """DALI on the CPU: it decodes only the crop. Its threads take the place of workers, one for none."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    @pipeline_def(batch_size=batch, num_threads=max(1, workers), device_id=None)
    def crops():
        files = fn.readers.webdataset(paths=shards, ext=["jpg"], random_shuffle=True, initial_fill=1000, name="images")
        sizes = {"random_area": [0.2, 1.0], "random_aspect_ratio": [3 / 4, 4 / 3]}
        images = fn.decoders.image_random_crop(files, device="cpu", output_type=types.RGB, **sizes)
        images = fn.resize(images, size=[img_size, img_size], interp_type=types.INTERP_CUBIC, antialias=True)
        return fn.flip(images, horizontal=fn.random.coin_flip())

    policy = LastBatchPolicy.PARTIAL
    return DALIGenericIterator(crops(), ["image"], reader_name="images", last_batch_policy=policy, auto_reset=True)


#: Name in the table -> packages that have it, and its loader.
OTHERS: dict[str, tuple[tuple[str, ...], Callable[[list[str], int, int, int], Iterable]]] = {
    "webdataset": (("webdataset",), webdataset_loader),
    "DALI on the CPU": (("nvidia-dali-cuda130", "nvidia-dali-cuda120"), dali_loader),
}


def installed(packages: Sequence[str]) -> str | None:
    """The version of the first of these packages that is installed, or None."""
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None
