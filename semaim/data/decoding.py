"""Decoding of image files and of images in shards: always RGB of 8 bits, of at most `MOST_PIXELS`, or a `UserError`."""

import contextlib
import io
import os

import cv2
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from semaim.data.shards import printable, read_bytes
from semaim.errors import UserError

#: Largest image that is decoded, 13,377 pixels square: where Pillow itself refuses. OpenCV would go on to six times
#: this size and 3 GB of memory. Read from the header, before anything is decoded.
MOST_PIXELS = 2 * 89_478_485

JPEG = (".jpg", ".jpeg")
#: Pillow's modes of one channel of 16 bits; 'I' is also that of older versions for such PNG files.
DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")


def load_image(path: str, smallest: int = 1) -> Image.Image:
    """An image file as RGB; `UserError` if it is broken, too large, or has a side below `smallest` pixels."""
    return decode_image(_bytes_of(path), path, smallest)


def decode_image(data: bytes, path: str, smallest: int = 1) -> Image.Image:
    """The content of an image file, named `path` in messages, as RGB; raises as `load_image`.

    Of 16 bits a channel the upper 8 are kept, as Pillow does for three channels, and OpenCV for one and three: Pillow's
    own conversion of one channel makes every value above 255 white.
    """
    with _opened(data, path) as opened:
        try:
            image = _grey(opened) if opened.mode in DEEP_MODES else opened.convert("RGB")
        except Exception as error:  # Pillow raises many types for the many ways a file can be broken
            raise broken(path, error) from None
    if min(image.size) < smallest:
        width, height = image.size
        raise UserError(
            f"image {printable(path)} of {width} x {height} pixels is smaller than a patch of {smallest}: remove it"
        )
    return image


def _grey(opened: Image.Image) -> Image.Image:
    """One channel of 16 bits as RGB of 8."""
    values = np.asarray(opened)
    if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise ValueError("32 bits a channel: convert it to 8")
    return Image.fromarray((values.astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")


def _opened(source: bytes | str, path: str) -> Image.Image:
    """The content of a file, or a file by its name, with its header read."""
    try:
        opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except Image.DecompressionBombError:  # its own text is about an attack
        raise too_large(path) from None
    except Exception as error:
        raise broken(path, error) from None
    if opened.width * opened.height > MOST_PIXELS:
        raise too_large(path, opened.size)
    return opened


def _bytes_of(path: str) -> bytes:
    try:
        return read_bytes(path)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise broken(path, error) from None


def broken(path: str, error: Exception) -> UserError:
    """The error for a file that cannot be read or decoded."""
    if isinstance(error, FileNotFoundError):
        reason = "no such file"
    elif isinstance(error, UnidentifiedImageError):  # Pillow's text names the buffer in memory
        reason = "broken or no image (of no known kind)"
    else:
        reason = f"broken or no image ({' '.join(str(error).split())[:200] or type(error).__name__})"
    return UserError(f"cannot read image {printable(path)}: {reason}; repair or remove it")


def too_large(path: str, size: tuple[int, int] | None = None) -> UserError:
    """The error for an image beyond `MOST_PIXELS`."""
    has = f"has {size[0]} x {size[1]} pixels, more than" if size else "has more pixels than"
    return UserError(f"image {printable(path)} {has} the {MOST_PIXELS:,} that are read: make it smaller, or remove it")


def check_whole(path: str | os.PathLike) -> None:
    """`UserError` for an image of more than `MOST_PIXELS`, or a truncated JPEG, of which OpenCV may read a part."""
    path = os.fspath(path)
    _opened(path, path).close()
    if not path.lower().endswith(JPEG):
        return
    with open(path, "rb") as file:
        file.seek(-2, os.SEEK_END)
        if file.read() == b"\xff\xd9":  # the end-of-image marker; other data may also follow it
            return
    load_image(path)


def load_pixels(path: str, smallest: int = 1) -> Tensor:
    """As `load_image`, but uint8 (3, H, W), channels last in memory, and faster: JPEGs are decoded by OpenCV.

    The pixels equal Pillow's (CMYK's may differ by 1), without a copy in between.
    """
    return decode_pixels(_bytes_of(path), path, smallest)


def decode_pixels(data: bytes, path: str, smallest: int = 1) -> Tensor:
    """`load_pixels` for the content of a file."""
    if path.lower().endswith(JPEG):
        _opened(data, path).close()
        with contextlib.suppress(cv2.error):
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
            if pixels is not None and min(pixels.shape[:2]) >= smallest:
                return torch.from_numpy(pixels).permute(2, 0, 1)
    return pil_to_tensor(decode_image(data, path, smallest))  # names the error of a broken file
