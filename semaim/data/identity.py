"""Whether a data set is still the one that a run started with: the names and sizes of its files."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from semaim.data.shards import ADDRESS, inner_name

THREADS = 16  #: that ask for sizes at once: on a network disk each answer takes long
CHUNK = 4096  #: files that a thread asks for in turn


def identity_of(files: Iterable[str], root: str | os.PathLike) -> str:
    """A hash of the files' names, relative to `root`, and sizes, in this order: 32 hexadecimal digits.

    Contents are not read: a file that was replaced by one of the same size is not noticed. A missing file counts as
    one of size -1; reading it will say more.

    Args:
        files: paths, or addresses in shards.
        root: of the data; the same data in another place are the same.
    """
    start, found = os.path.join(os.fspath(root), ""), hashlib.blake2b(digest_size=16)
    files = iter(files)
    chunks = iter(lambda: list(islice(files, CHUNK)), [])
    with ThreadPoolExecutor(THREADS) as pool:
        waiting = []
        for chunk in chunks:
            waiting.append((chunk, pool.submit(lambda paths: [*_sizes(paths)], chunk)))
            if len(waiting) > 2 * THREADS:
                _add(found, start, *waiting.pop(0))
        for pair in waiting:
            _add(found, start, *pair)
    return found.hexdigest()


def _add(found, start: str, files: list[str], sizes) -> None:
    for path, size in zip(files, sizes.result(), strict=True):
        place = ADDRESS.fullmatch(path)
        name = f"{place[1]}={inner_name(path)}" if place else path
        found.update(os.fsencode(f"{name.removeprefix(start)}\0{size}\0"))


def _sizes(files: list[str]) -> Iterator[int]:
    for path in files:
        if place := ADDRESS.fullmatch(path):
            yield int(place[3])
            continue
        try:
            yield os.stat(path).st_size
        except OSError:
            yield -1
