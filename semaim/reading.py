"""Reading a file once: a command looks at its checkpoint and annotations for several things before it starts."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_kept: dict[tuple, Any] = {}
_depth = 0


@contextmanager
def read_once() -> Iterator[None]:
    """Within it, what `once` reads is kept until `forget` or the end. Whoever gets the content must not change it."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth = max(0, _depth - 1)
        if not _depth:
            _kept.clear()


def forget() -> None:
    """Free what is kept, and keep nothing more: the run starts, and needs the memory."""
    global _depth
    _kept.clear()
    _depth = 0


def keeping() -> bool:
    """Whether files are read once now."""
    return _depth > 0


def once(path: str | os.PathLike, read: Callable[[Any], Any], kind: str = "checkpoint") -> Any:
    """`read(path)`, or what was read before, within `read_once` and while the file is the same.

    Args:
        path: of the file.
        read: gives its content.
        kind: functions of one kind read the same content.
    """
    if not _depth:
        return read(path)
    try:
        status = os.stat(path)
    except OSError:
        return read(path)  # which says what is wrong
    key = (kind, os.path.realpath(path), status.st_mtime_ns, status.st_size)
    if key not in _kept:
        _kept[key] = read(path)
    return _kept[key]
