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

ADDRESS = re.compile(r"(.*\.tar)\?(\d+)\+(\d+)=.*", re.DOTALL)


def find_in_shards(shards: Iterable[Path], extensions: tuple[str, ...]) -> list[str]:
    """Addresses SHARD.tar?OFFSET+BYTES=NAME of the files with these extensions, in their order in the shards."""
    found = []
    for shard in shards:
        length = shard.stat().st_size
        try:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    if member.offset_data + member.size > length:
                        raise UserError(f"{shard} ends within {member.name}: copy it again")
                    name = os.path.basename(member.name).lower()
                    image = name.endswith(extensions) and not name.startswith(".")
                    if image and member.isreg() and not member.issparse():
                        found.append(f"{shard}?{member.offset_data}+{member.size}={member.name}")
                    archive.members.clear()  # type: ignore[attr-defined]  # not in typeshed; a header is 1 kB in memory
        except (tarfile.TarError, EOFError) as error:
            raise UserError(f"{shard} is no tar file, or a broken one ({error}): copy it again, or remove it") from None
    return found


def read_bytes(path: str) -> bytes:
    """The bytes of a file or of an image in a shard; OSError as from `open`."""
    place = ADDRESS.fullmatch(path)
    if place is None:
        return Path(path).read_bytes()
    shard, offset, size = place[1], int(place[2]), int(place[3])
    with open(shard, "rb", buffering=0) as file:
        return os.pread(file.fileno(), size, offset)
