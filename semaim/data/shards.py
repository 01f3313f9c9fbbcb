"""Images inside tar files, such as webdataset's shards, as if they lay in folders.

A tar file is read at random: each image is addressed by its shard, place and size, found once, from the headers. So a
run over shards has the samples, the shuffling and the exact resuming of one over folders, on any number of processes
and nodes. Nothing is ever unpacked.
"""

import os
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path

from semaim.errors import UserError

ADDRESS = re.compile(r"(.*\.tar)\?(\d+)\+(\d+)=.*", re.DOTALL)


def find_in_shards(shards: Iterable[Path], extensions: tuple[str, ...]) -> list[str]:
    """Addresses SHARD.tar?OFFSET+BYTES=NAME of the files with these endings, in the order they lie in."""
    found = []
    for shard in shards:
        length = shard.stat().st_size
        try:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    if member.offset_data + member.size > length:
                        raise UserError(f"{shard} ends within {member.name}: copy it anew")
                    name = os.path.basename(member.name).lower()
                    image = name.endswith(extensions) and not name.startswith(".")
                    if image and member.isreg() and not member.issparse():
                        found.append(f"{shard}?{member.offset_data}+{member.size}={member.name}")
                    archive.members.clear()  # type: ignore[attr-defined]  # not in typeshed; a header is 1 kB in memory
        except (tarfile.TarError, EOFError) as error:
            raise UserError(f"{shard} is no tar file, or a broken one ({error}): copy it anew, or remove it") from None
    return found


def read_bytes(path: str) -> bytes:
    """The bytes of a file, or of one that a shard holds; OSError as `open`."""
    place = ADDRESS.fullmatch(path)
    if place is None:
        return Path(path).read_bytes()
    shard, offset, size = place[1], int(place[2]), int(place[3])
    with open(shard, "rb", buffering=0) as file:
        return os.pread(file.fileno(), size, offset)
