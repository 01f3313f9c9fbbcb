"""Images made smaller for training: what becomes of one image, and of the list of all."""

import io
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from semaim.data.decoding import JPEG, decode_pixels
from semaim.data.folder import every_file, images_among, name_of
from semaim.data.image_files import examine_pixels
from semaim.data.shards import inner_name, printable, read_bytes
from semaim.errors import UserError


class Small(NamedTuple):
    """An image on its way into a shard.

    Attributes:
        name: in the shard.
        data: its file there; empty if the source cannot be read.
        as_it_was: whether it is the source's file.
        bytes: of the source.
        kind, text: what is wrong with the source, as in `semaim.data.image_files.Examined`.
    """

    name: str
    data: bytes
    as_it_was: bool
    bytes: int
    kind: str
    text: str


def shrink_to(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(height, width) with a short side of at most `side` pixels: as torchvision's Resize, but never enlarged."""
    short, long = sorted(size)
    if short <= side:
        return size
    long = int(side * long / short)
    return (side, long) if size[0] == short else (long, side)


def shrink_image(path: str, name: str, side: int, quality: int) -> Small:
    """An image with a short side of at most `side` pixels, in a process that listens.

    The pixels are the loader's own, so without EXIF rotation, as RGB and without alpha; antialiased bicubic. An image
    that is small enough is its file as it is.
    """
    found, data, pixels = examine_pixels(path)
    if pixels is None:
        return Small(name, b"", False, len(data), found.kind, found.text)
    height, width = pixels.shape[1:]
    size = shrink_to((height, width), side)
    if size == (height, width):
        return Small(name, data, True, len(data), found.kind, found.text)
    small = F.resize(pixels, list(size), InterpolationMode.BICUBIC, antialias=True)
    file = io.BytesIO()
    Image.fromarray(small.permute(1, 2, 0).contiguous().numpy()).save(file, "JPEG", quality=quality)
    name += "" if name.lower().endswith(JPEG) else ".jpg"
    return Small(name, file.getvalue(), False, len(data), found.kind, found.text)


def list_source(source: Path) -> tuple[list[str], list[str]]:
    """Names of all images and of all other files below a folder, in sorted order; `UserError` if there are no images.

    Unlike pretraining, which reads `train` alone, it has all splits.
    """
    if not source.is_dir():
        raise UserError(f"no such folder: {source}")
    files = every_file(source)
    images = [name_of(path, source) for path in images_among(files, source)]
    others = [name for name in (name_of(path, source) for path in files) if not name.lower().endswith(IMG_EXTENSIONS)]
    if not images:
        packed = any(name.endswith(".tar") for name in others)
        raise UserError(f"no images in {source}" + ": its shards are not read, unpack them" * packed)
    names = set(images)
    if twice := next((name for name in images if not name.lower().endswith(JPEG) and f"{name}.jpg" in names), None):
        raise UserError(f"{source} has {twice} and {twice}.jpg, and the former gets the latter's name: rename one")
    return images, others


def compare(source: str, path: str, side: int) -> str:
    """What is wrong with an image of the copy at `path`; empty if nothing is."""
    name = printable(inner_name(path))
    try:
        with Image.open(source) as opened:  # of which the header alone is read
            width, height = opened.size
        data = read_bytes(path)
        found = tuple(decode_pixels(data, path).shape[1:])
        size = shrink_to((height, width), side)
        if size == (height, width):
            return "" if data == read_bytes(source) else f"{name}: not the source's file"
    except Exception as error:  # Pillow raises many types
        return " ".join(str(error).split())
    return "" if found == size else f"{name}: {found[1]} x {found[0]} pixels, not {size[1]} x {size[0]}"
