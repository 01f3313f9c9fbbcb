"""Images for pretraining from a folder, a list file or tar shards: reproducible random crops and resumable batches.

All randomness of a sample - its crop, its flip, and the uniform numbers that later break ties in its order - comes from
(seed, epoch, index). So a run does not depend on the number of workers, processes or accumulated steps, and
resumes inside an epoch by skipping the batches that are done.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from mmengine.logging import MMLogger
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode, v2

from semaim.data.decoding import load_image, load_pixels
from semaim.data.shards import find_in_shards
from semaim.errors import UserError

HELD_OUT = ("val", "valid", "validation", "test")  #: folders beside `train` that hold no training images
ATTEMPTS = 100  #: images drawn in the place of one that cannot be read


def find_images(root: str | os.PathLike) -> list[str]:
    """Paths of the images under `root`, sorted.

    `root` is a folder (of class folders or flat; its `train` folder if one of validation or test images lies beside
    that: else `train` may be a class), or a text file with one path per line, relative to that file, optionally
    followed by a label. For a folder of .tar files, or one such file, the images inside are returned.

    Raises:
        UserError: there are none, or a folder in it holds the label maps of ADE20K's layout, PNG files as well.
    """
    root = Path(root)
    if root.is_file():
        return find_in_shards([root], IMG_EXTENSIONS) if root.suffix == ".tar" else read_list(root)
    files = files_below(root)
    images = images_among(files, root)
    images = images or find_in_shards([Path(path) for path in files if path.endswith(".tar")], IMG_EXTENSIONS)
    if not images:
        packed = any(path.endswith((".tar.gz", ".tgz", ".tar.zst")) for path in files)
        raise UserError(
            f"no images in {root}: looked in all its folders for {', '.join(IMG_EXTENSIONS)}, and in .tar files"
            + "; its compressed shards cannot be read at random: unpack them to .tar" * packed
        )
    return images


def images_among(files: list[str], root: Path) -> list[str]:
    """The files below the root that are images by their names; `UserError` if some are the label maps of ADE20K's."""
    images = [path for path in files if path.lower().endswith(IMG_EXTENSIONS)]
    labels = f"{os.sep}annotations{os.sep}"  # of ADE20K's layout: PNG files that are no images
    if found := next((path for path in images if labels in path[len(str(root)) :]), None):
        folder = found[: found.rindex(labels)]
        raise UserError(f"{folder}/annotations holds label maps, not images: name {folder}/images")
    return images


def files_below(root: Path) -> list[str]:
    """Paths of the files below a folder that training reads, sorted; raises as `every_file`."""
    if (root / "train").is_dir() and any((root / name).is_dir() for name in HELD_OUT):
        root = root / "train"
    return every_file(root)


def every_file(root: Path) -> list[str]:
    """Paths of the files below a folder, sorted, without those whose names begin with a dot.

    `UserError` if there is no such folder, or a link in it leads back to a folder that the link is in.
    """
    if not root.is_dir():
        raise UserError(f"no such folder: {root} (name the images with --data-root DIR)")
    found = []
    for folder, inner, names in os.walk(root, followlinks=True):
        for name in inner:
            path = os.path.join(folder, name)
            if os.path.islink(path) and any(os.path.samefile(path, above) for above in Path(path).parents):
                raise UserError(
                    f"{path} is a link to {os.path.realpath(path)}, a folder that it is in, so images would be read"
                    " many times, and in other classes: remove the link"
                )
        found += [os.path.join(folder, name) for name in names if not name.startswith(".")]
    return sorted(found)


def name_of(path: str, root: str | os.PathLike) -> str:
    """A path that `find_images` has found, relative to the root, or to the folder of a root that is a file."""
    base = Path(root).parent if os.path.isfile(root) else Path(root)
    start = str(base / "x")[:-1]
    return path[len(start) :] if path.startswith(start) else path


def without(paths: list[str], root: str | os.PathLike, file: str | os.PathLike) -> list[str]:
    """The images that a list of files to skip does not name, see `semaim.data.image_files`.

    `UserError` if the list cannot be read, names none of the images, or all.
    """
    try:
        names = set(Path(file).read_text("utf-8", "surrogateescape").split("\n")) - {""}
    except OSError as error:
        raise UserError(f"cannot read dataset.skip {file}: {error.strerror}") from None
    kept = [path for path in paths if name_of(path, root) not in names]
    if names and len(kept) == len(paths):
        raise UserError(f"dataset.skip {file} names no image in {root}: a line is a path relative to it")
    if not kept:
        raise UserError(f"dataset.skip {file} names all images in {root}")
    return kept


def read_list(file: Path) -> list[str]:
    """The paths in a list file; `UserError` if it has none."""
    try:
        lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{file} is no text file: give a folder of images, or a list of paths, one per line") from None
    paths = []
    for line in lines:
        path, _, label = line.rpartition(" ")
        paths.append(os.path.join(file.parent, path.rstrip() if path and label.isdigit() else line))
    if not paths:
        raise UserError(f"no images in {file}: it is an empty list")
    return paths


def seed_of(*parts: int) -> int:
    """A 63-bit seed from non-negative whole numbers, well mixed."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


class PretrainImages(Dataset):
    """Random crops of unlabelled images.

    Args:
        root: as in `find_images`.
        img_size: side of the crops in pixels.
        patch_size: side of a patch in pixels.
        min_scale: smallest share of an image's area that a crop may have.
        flip: probability of a horizontal flip.
        seed: of the run.
        mean, std: of the three channels of pixels from 0 to 1, by which the model normalises; None for ImageNet's.
        on_error: "raise" ends the run at an image that cannot be read; "skip" names it in the log, and another image
            takes its place, drawn by (seed, epoch, index).
        most_damaged: with "skip", the largest share of the images that may be unreadable; more end the run.
        skip: file that names images to leave out, one a line, as tools/verify_dataset.py images --out writes it.

    The key of an item is (epoch, index). An item is a dict of `image`, uint8 (3, S, S), and `draw`, float32 (L,), one
    uniform number per patch.
    """

    metainfo: dict = {}  # mmengine reads it

    def __init__(
        self,
        root: str,
        img_size: int = 224,
        patch_size: int = 16,
        min_scale: float = 0.2,
        flip: float = 0.5,
        seed: int = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        on_error: str = "raise",
        most_damaged: float = 0.01,
        skip: str | None = None,
    ):
        if on_error not in ("raise", "skip"):
            raise UserError(f"dataset.on_error {on_error!r}: choose raise or skip")
        paths = find_images(root)
        if skip is not None:
            paths = without(paths, root, skip)
        # One array of bytes instead of a list of str: workers share it without copying.
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.root, self.seed, self.img_size, self.patch_size = root, seed, img_size, patch_size
        self.mean, self.std = mean, std
        self.most_damaged = most_damaged
        #: Which images could not be read, in memory that all workers of a process share; None to raise.
        self.damaged = torch.zeros(len(paths), dtype=torch.uint8).share_memory_() if on_error == "skip" else None
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(img_size, scale=(min_scale, 1.0), interpolation=InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(flip),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = key
        _, image = self.read(epoch, index)
        state = torch.get_rng_state()
        # Not torch.manual_seed, which would seed the GPU's generator too.
        torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))
        try:
            return {"image": self.transform(image), "draw": torch.rand((self.img_size // self.patch_size) ** 2)}
        finally:
            torch.set_rng_state(state)

    def read(self, epoch: int, index: int) -> tuple[int, Tensor]:
        """An image, uint8 (3, H, W), and its index: with `on_error="skip"` another one's, if it cannot be read."""
        chosen = index
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return chosen, load_pixels(os.fsdecode(self.paths[chosen]), self.patch_size)
            except UserError as error:
                if self.damaged is None:
                    raise
                self._skip(chosen, error)
            chosen = seed_of(self.seed, epoch, index, attempt) % len(self)
        raise UserError(f"none of {ATTEMPTS} images can be read, the last is {os.fsdecode(self.paths[chosen])}")

    def _skip(self, index: int, error: UserError) -> None:
        """Name an image that cannot be read in the log, once; `UserError` if there are too many."""
        assert self.damaged is not None
        if self.damaged[index]:
            return
        self.damaged[index] = 1
        count = int(self.damaged.sum())
        if count > self.most_damaged * len(self):
            raise UserError(
                f"{count} of {len(self):,} images cannot be read, more than dataset.most_damaged={self.most_damaged:g}:"
                f" the last is: {error}"
            )
        # As an error, since processes other than the first log only these.
        MMLogger.get_current_instance().error(f"image skipped, {count} of {len(self):,} so far: {error}")

    def preview(self, count: int) -> Tensor:
        """`count` images spread over the data, centre-cropped: uint8 (count, 3, S, S)."""
        places = np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)
        chosen = [self.read(0, int(place))[0] for place in places]
        return centre_crops([os.fsdecode(self.paths[place]) for place in chosen], self.img_size)


def centre_crops(paths: list[str], img_size: int) -> Tensor:
    """The middle of each image, its short side resized to `img_size` pixels: uint8 (len(paths), 3, S, S)."""
    crop = v2.Compose(
        [
            v2.Resize(img_size, interpolation=InterpolationMode.BICUBIC),
            v2.CenterCrop(img_size),
            v2.PILToTensor(),
        ]
    )
    return torch.stack([crop(load_image(path)) for path in paths])


class ResumableBatches(Sampler[list[tuple[int, int]]]):
    """Shuffled batches of (epoch, index) for one process.

    A total batch of `images * processes * accumulation` images is the same however it is divided into processes and
    accumulated steps. Images left at the end of an epoch that fill no total batch wait for the next epoch's shuffle.

    Args:
        length: images in the data set.
        images: images per process and step.
        accumulation: steps whose gradients are summed before the optimizer steps.
        processes, rank: of the distributed run.
        seed: of the run.
    """

    def __init__(
        self, length: int, images: int, accumulation: int = 1, processes: int = 1, rank: int = 0, seed: int = 0
    ):
        self.length, self.images, self.accumulation = length, images, accumulation
        self.processes, self.rank, self.seed = processes, rank, seed
        self.epoch = 0
        self.start = 0  #: batches of this epoch already done
        total = images * accumulation * processes
        if length < total:
            raise UserError(
                f"{length} images are fewer than one batch of {total}: set --cfg-options total_batch_size=N"
            )
        self.steps = length // total

    def __len__(self) -> int:
        """Number of batches in a whole epoch, whatever `start` is."""
        return self.steps * self.accumulation

    def mine(self, start: int) -> list[list[int]]:
        """Indices of this process's batches of the epoch, from the batch `start` on."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator)
        order = order[: len(self) * self.processes * self.images]
        return order.view(len(self), self.processes, self.images)[start:, self.rank].tolist()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        for batch in self.mine(self.start):
            yield [(epoch, index) for index in batch]


class EndlessBatches(ResumableBatches):
    """`ResumableBatches` epoch after epoch, from iteration `start` of the run."""

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        self.epoch, begin = divmod(self.start, len(self))
        while True:
            for batch in self.mine(begin):
                yield [(self.epoch, index) for index in batch]
            self.epoch, begin = self.epoch + 1, 0
