"""Find what is wrong with the image files of a folder, a list or tar shards, before hours are spent on them.

Every image is read as pretraining reads it, and more strictly: JPEG data that libjpeg can only guess at are found by
its warnings, which decoders do not pass on, and damaged PNG files by their checksums.
"""

import hashlib
import io
import os
import sys
import tempfile
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from semaim.data.decoding import MOST_PIXELS, decode_pixels
from semaim.data.findings import Report, StrPath, parallel
from semaim.data.folder import files_below, find_images, name_of
from semaim.data.pools import process_pool
from semaim.data.shards import RECORD, find_in_shards, printable, read_bytes
from semaim.errors import UserError

#: What libjpeg writes about data that it cannot decode as they stand.
JPEG_WARNINGS = (b"Corrupt JPEG data", b"Premature end of JPEG file", b"Unsupported marker", b"Invalid ")
DAMAGED = "damaged JPEG data"  #: the kind of an image that libjpeg has written such a warning of


class Examined(NamedTuple):
    """An image file.

    Attributes:
        kind: of what is wrong with it; empty if nothing is.
        text: the details.
        digest: hash of its bytes; empty if there are none.
    """

    kind: str
    text: str
    digest: bytes


def verify_images(
    root: StrPath, smallest: int = 16, workers: int = 4, progress: bool = False
) -> tuple[Report, list[str]]:
    """Check every image that pretraining would read.

    Args:
        root: as for `semaim.data.folder.find_images`.
        smallest: least side of an image in pixels, a patch's.
        workers: processes.
        progress: show a bar if the standard error is a terminal.

    Returns:
        The report, and the names of images to leave out, relative to `root`: those with a problem, and of images with
        the same bytes all but the first. `UserError` if there are no images.
    """
    report, folder = Report(str(root)), Path(root)
    if folder.is_file() and folder.suffix != ".tar":
        paths = find_images(folder)
    else:
        files = [str(folder)] if folder.is_file() else files_below(folder)
        paths = [path for path in files if path.lower().endswith(IMG_EXTENSIONS)]
        shards = [path for path in files if path.endswith(".tar")]
        for path in files:
            if path not in shards and not path.lower().endswith((*IMG_EXTENSIONS, RECORD)):
                report.warning("file that is no image by its name", name_of(path, root))
        if paths and shards:
            report.warning("shards beside images, which are not read", name_of(shards[0], root))
        for shard in [] if paths else shards:
            try:
                paths += find_in_shards([Path(shard)], IMG_EXTENSIONS)
            except UserError as error:
                report.problem("broken shard", str(error))
    if not paths and not report.problems:
        find_images(root)  # says what it has looked for
    pool = process_pool(max(1, workers), None, listen, smallest)
    try:
        examined: list[Examined] = parallel(examine, paths, workers, progress, "images", pool)
    except BrokenProcessPool:
        raise UserError(
            f"{root}: a process that reads its images has ended: out of memory, or a decoder crashed"
        ) from None
    left_out, first = [], dict[bytes, str]()
    for path, found in zip(paths, examined, strict=True):
        name = name_of(path, root)
        if found.kind:
            report.problem(found.kind, f"{printable(name)}: {found.text}")
            left_out.append(name)
        elif found.digest in first:
            report.warning("same bytes as another image", f"{printable(name)}, {printable(first[found.digest])}")
            left_out.append(name)
        else:
            first[found.digest] = name
    report.summary.append(f"{len(paths):,} images, {len(left_out):,} of them to leave out")
    return report, left_out


def write_list(names: list[str], file: StrPath) -> None:
    """Write names of images, one a line, as `dataset.skip` reads them; `UserError` if that cannot be done."""
    if odd := [name for name in names if "\n" in name]:
        raise UserError(f"{odd[0]!r} has a line break in its name, which a list of files cannot hold: rename it")
    try:
        Path(file).write_text("".join(f"{name}\n" for name in names), "utf-8", "surrogateescape")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from None


_smallest = 1
_heard: BinaryIO  #: file that the standard error of this process goes to


def listen(smallest: int) -> None:
    """Have a process write its errors, those of C libraries too, into a file that it can read."""
    global _smallest, _heard
    _smallest, _heard = smallest, tempfile.TemporaryFile()
    sys.stderr.flush()
    os.dup2(_heard.fileno(), 2)


def examine(path: str) -> Examined:
    """Read an image in a process that listens; exceptions become findings."""
    return examine_pixels(path)[0]


def examine_pixels(path: str) -> tuple[Examined, bytes, Tensor | None]:
    """`examine`, with the bytes of the file and its pixels, uint8 (3, H, W); None for those that cannot be decoded."""
    try:
        data = read_bytes(path)
    except (OSError, ValueError) as error:
        return Examined("image that cannot be opened", getattr(error, "strerror", None) or str(error), b""), b"", None
    if not data:
        return Examined("empty file", "0 bytes", b""), data, None
    digest = hashlib.blake2b(data, digest_size=16).digest()
    _heard.truncate(0)
    _heard.seek(0)
    try:
        pixels = decode_pixels(data, path)
        with Image.open(io.BytesIO(data)) as opened:
            opened.verify()  # a PNG's checksums
    except UserError as error:
        text = str(error).removeprefix(f"cannot read image {printable(path)}: ").removesuffix("; repair or remove it")
        kind = "image of too many pixels" if f"the {MOST_PIXELS:,} that are read" in text else "broken image"
        return Examined(kind, text, digest), data, None
    except Exception as error:  # Pillow raises many types
        return Examined("broken image", " ".join(str(error).split()), digest), data, None
    heard = os.pread(_heard.fileno(), 4096, 0)
    if any(text in heard for text in JPEG_WARNINGS):
        text = heard.decode(errors="replace").splitlines()[0]
        return Examined(DAMAGED, text, digest), data, pixels
    height, width = pixels.shape[1:]
    if min(height, width) < _smallest:
        return Examined(f"image with a side below {_smallest} pixels", f"{width} x {height}", digest), data, pixels
    return Examined("", "", digest), data, pixels
