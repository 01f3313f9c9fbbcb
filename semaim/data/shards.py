"""Images inside tar files, such as webdataset's shards, used like images in folders.

Tar files are read at random: each image is addressed by its shard, offset and size, read once from the headers. So
a run over shards has the same samples, shuffling and exact resuming as a run over folders, on any number of
processes and nodes. Nothing is unpacked.
"""

import os
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path

from semaim.errors import UserError

ADDRESS = re.compile(r"(.*?\.tar)\?(\d+)\+(\d+)=.*", re.DOTALL)

RECORD = "shrink.json"  #: in the folder of a copy that `semaim.data.copying` has written


def find_in_shards(shards: Iterable[Path], extensions: tuple[str, ...]) -> list[str]:
    """Addresses SHARD.tar?OFFSET+BYTES=NAME of the files with these extensions, in their order in the shards.

    `UserError` for a shard that cannot be opened, is damaged or truncated, or has something after its end.
    """
    found = []
    for shard in shards:
        try:
            with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
                length = os.fstat(file.fileno()).st_size
                for member in archive:
                    if not 0 <= member.size <= length - member.offset_data:
                        raise UserError(f"{shard} ends within {printable(member.name)}: copy it again")
                    name = os.path.basename(member.name).lower()
                    image = name.endswith(extensions) and not name.startswith(".")
                    if image and member.isreg() and not member.issparse():
                        found.append(f"{shard}?{member.offset_data}+{member.size}={member.name}")
                    archive.members.clear()  # type: ignore[attr-defined]  # not in typeshed; a header is 1 kB in memory
                # tarfile takes a damaged header, and one of zeros in the middle, for the end of the file.
                file.seek(archive.offset)
                while rest := file.read(1 << 20):
                    if rest.strip(b"\0"):
                        raise tarfile.ReadError(f"what follows byte {archive.offset:,} is no member")
        except OSError as error:
            raise UserError(f"cannot read {shard}: {error.strerror or error}") from None
        except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError, MemoryError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(
                f"{shard} is no tar file, or a broken one ({reason}): copy it again, or remove it"
            ) from None
    return found


def inner_name(path: str) -> str:
    """The name of an image within its shard; other paths as they are."""
    place = ADDRESS.fullmatch(path)
    return path[place.end(3) + 1 :] if place else path


def printable(name: str) -> str:
    """A file name for a message, which is one line."""
    return name if name.isprintable() else repr(name)


def _at_once(path: str, flags: int) -> int:
    """Open a file without waiting: a named pipe among the images is then an empty file, and the run does not hang."""
    return os.open(path, flags | os.O_NONBLOCK)


def read_bytes(path: str) -> bytes:
    """The bytes of a file or of an image in a shard; OSError as from `open`."""
    place = ADDRESS.fullmatch(path)
    if place is None:
        with open(path, "rb", buffering=0, opener=_at_once) as file:
            return file.read()
    shard, offset, size = place[1], int(place[2]), int(place[3])
    with open(shard, "rb", buffering=0) as file:
        return os.pread(file.fileno(), size, offset)
