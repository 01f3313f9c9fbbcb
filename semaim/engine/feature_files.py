"""Features of any encoder for files of images, written in parts: memory does not grow with their number.

Shapes: N images, L patches, D channels.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
from timm.layers import to_2tuple
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from semaim.checkpoints.loading import PARTIAL_HINT
from semaim.data.decoding import load_image
from semaim.data.labelled import evaluation_transform
from semaim.encoders.contract import Encoder
from semaim.encoders.sources import open_source
from semaim.errors import UserError


class Prepared(NamedTuple):
    """An encoder in eval mode, and how its images are prepared.

    Attributes:
        encoder: on the CPU.
        transform: PIL image -> float (3, S, S), normalised.
        size: S, in pixels.
        mean, std: of the three channels of pixels from 0 to 1.
        words: all this, for the log.
    """

    encoder: Encoder
    transform: Callable[[Any], Tensor]
    size: int
    mean: Sequence[float]
    std: Sequence[float]
    words: str


def prepare(source: str, arch: str | None = None, size: int | None = None) -> Prepared:
    """An encoder and its own preparation of images: size, crop, interpolation, mean and deviation.

    Args:
        source: of the encoder, see `semaim.encoders.sources`.
        arch: timm's name of the architecture in a file that does not tell it.
        size: side of the images in pixels; None for the encoder's own.

    Raises:
        UserError: the source is not understood, or does not determine how its images are prepared.
    """
    try:
        found = open_source(source, arch)
    except UserError as error:  # of a fine-tuned network, for example, whose final norm is another
        raise UserError(str(error).replace(PARTIAL_HINT, "")) from None
    preparation = found.preparation
    height, width = to_2tuple(size) if size else preparation.size
    if preparation.statistics is None:
        raise UserError(preparation.unknown)
    if preparation.crop_pct is None:
        raise UserError(
            f"the crop of {source}'s images is not known, as timm's weights of that architecture differ: name them,"
            " --arch NAME.TAG"
        )
    if height != width:
        raise UserError(f"{source} is for images of {height} x {width} pixels: give --size, the side of a square")
    with torch.random.fork_rng(devices=[]):
        encoder = found.build(**({"img_size": (height, width)} if size else {}))
    encoder.load(found)
    encoder.grid_of((height, width))  # raises
    # Images of our own ViT are prepared as its tasks prepare them, whose resizing rounds where timm's cuts off.
    own = found.checkpoint is not None
    how = (None, None) if own else (preparation.crop_mode, preparation.interpolation)
    mean, std = preparation.statistics.mean, preparation.statistics.std
    transform = evaluation_transform(height, preparation.crop_pct, mean, std, *how)
    words = f"{encoder.title}; {preparation}" + (f"; here of {size} pixels" if size else "")
    return Prepared(encoder.eval(), transform, height, mean, std, words)


class _Images(Dataset):
    """Images by index, prepared; in the place of one that cannot be read the message of its error."""

    def __init__(self, paths: Sequence[str], transform: Callable[[Any], Tensor]):
        self.paths = np.array([os.fsencode(path) for path in paths])  # a list would be copied into every worker
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            return self.transform(load_image(os.fsdecode(self.paths[index])))
        except UserError as error:
            return str(error)


class Part(NamedTuple):
    """Features of some images, float32 (n, D) or of their patches (n, L, D), their paths, and errors of others."""

    features: np.ndarray | None
    paths: list[str]
    errors: list[str]


@torch.no_grad()
def features_of(
    prepared: Prepared,
    paths: Sequence[str],
    pool: str | None,
    batch: int = 32,
    workers: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[Part]:
    """Features of images, a batch at a time and in their order, in fp32.

    Args:
        prepared: the encoder with its transform.
        paths: of the images.
        pool: a name of `semaim.encoders.POOLS`; None for the tokens of the patches.
        batch: images at a time.
        workers: processes that read images.
        device: to compute on.
    """
    encoder = prepared.encoder.to(device)
    loader = DataLoader(_Images(paths, prepared.transform), batch, num_workers=workers, collate_fn=list)
    for number, items in enumerate(loader):
        named = zip(paths[number * batch :], items, strict=False)
        read = [(path, item) for path, item in named if not isinstance(item, str)]
        errors = [item for item in items if isinstance(item, str)]
        features = None
        if read:
            tokens = encoder(torch.stack([item for _, item in read]).to(device))
            found = tokens[:, encoder.num_prefix_tokens :] if pool is None else encoder.pool(tokens, pool)
            features = found.float().cpu().numpy()
        yield Part(features, [path for path, _ in read], errors)


# Files


class Writer(Protocol):
    """Writes rows to a file that gets its name when all are in it."""

    def add(self, features: np.ndarray, paths: Sequence[str]) -> None:
        """Append rows, float32 (n, ...), of images with these paths."""

    def finish(self) -> None:
        """Give the file its name."""

    def discard(self) -> None:
        """Remove what is written."""


class NpyFile:
    """FILE.npy, float32 (N, ...), and FILE.txt, the path of each row's image on a line."""

    def __init__(self, path: Path):
        self.path, self.names = path, path.with_suffix(".txt")
        self.parts = [_part(self.path), _part(self.names)]
        self.shape: tuple[int, ...] = (0,)
        self.rows: BinaryIO = open(self.parts[0], "wb")
        self.text = open(self.parts[1], "w", encoding="utf-8", errors="surrogateescape", newline="\n")
        self.start = 0

    def add(self, features: np.ndarray, paths: Sequence[str]) -> None:
        """See `Writer.add`."""
        if not self.start:
            self.shape = (0, *features.shape[1:])
            self.start = self._head()
        self.rows.write(np.ascontiguousarray(features, dtype="<f4").tobytes())
        self.text.writelines(f"{path}\n" for path in paths)
        self.shape = (self.shape[0] + len(features), *self.shape[1:])

    def _head(self) -> int:
        """Write the header; returns its length, which numpy keeps the same for any number of rows."""
        self.rows.seek(0)
        header = {"descr": "<f4", "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(self.rows, header)
        return self.rows.tell()

    def finish(self) -> None:
        """See `Writer.finish`."""
        if self._head() != self.start:
            raise RuntimeError("numpy has changed the length of the header")
        self.rows.close()
        self.text.close()
        os.replace(self.parts[1], self.names)
        os.replace(self.parts[0], self.path)

    def discard(self) -> None:
        """See `Writer.discard`."""
        self.rows.close()
        self.text.close()
        for part in self.parts:
            part.unlink(missing_ok=True)


ROWS = 4096  #: of a part of a .parquet file, which readers open as a whole


class ParquetFile:
    """FILE.parquet with two columns: `path`, and `features`, a list of D float32 in every row."""

    def __init__(self, path: Path):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UserError(
                f"--out {path}: pyarrow is missing: install it with tools/setup.sh, or pip install 'semaim[parquet]',"
                " or name a .npy file"
            ) from None
        self.arrow, self.path, self.part = pyarrow, path, _part(path)
        self.writer: Any = None
        self.waiting: tuple[list[np.ndarray], list[str]] = [], []

    def add(self, features: np.ndarray, paths: Sequence[str]) -> None:
        """See `Writer.add`; rows wait in memory until a part of the file is full."""
        self.waiting[0].append(features)
        self.waiting[1].extend(paths)
        if len(self.waiting[1]) >= ROWS:
            self._write()

    def _write(self) -> None:
        arrow, (arrays, paths) = self.arrow, self.waiting
        features = np.concatenate(arrays).astype(np.float32, copy=False)
        self.waiting = [], []
        columns = {
            "path": arrow.array([os.fsencode(path).decode(errors="replace") for path in paths], arrow.string()),
            "features": arrow.FixedSizeListArray.from_arrays(arrow.array(features.ravel()), features.shape[1]),
        }
        table = arrow.table(columns)
        if self.writer is None:
            self.writer = arrow.parquet.ParquetWriter(self.part, table.schema)
        self.writer.write_table(table)

    def finish(self) -> None:
        """See `Writer.finish`."""
        if self.waiting[1]:
            self._write()
        self.writer.close()
        os.replace(self.part, self.path)

    def discard(self) -> None:
        """See `Writer.discard`."""
        if self.writer is not None:
            self.writer.close()
        self.part.unlink(missing_ok=True)


WRITERS: dict[str, type[NpyFile] | type[ParquetFile]] = {".npy": NpyFile, ".parquet": ParquetFile}


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def check_space(path: Path, images: int, shape: tuple[int, ...]) -> None:
    """`UserError` if float32 rows of this shape for so many images do not fit on the disk of the file's folder."""
    needed, free = 4 * images * int(np.prod(shape)), shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(
            f"--out {path}: features of {images:,} images, {' x '.join(map(str, shape))} values of fp32 each, take"
            f" {needed / 1e9:,.1f} GB, and its disk has {free / 1e9:,.1f} GB free"
        )
