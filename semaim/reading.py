"""Reading a file once: before it starts, a command checks its checkpoint and annotations for several things."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_kept: dict[tuple, Any] = {}
_depth = 0


@contextmanager
def read_once() -> Iterator[None]:
    """Context in which what `once` reads is kept until `forget` or the end. Callers must not change the content."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth = max(0, _depth - 1)
        if not _depth:
            _kept.clear()


def forget() -> None:
    """Free what is kept and stop keeping: the run starts and needs the memory."""
    global _depth
    _kept.clear()
    _depth = 0


def keeping() -> bool:
    """Whether `read_once` is active."""
    return _depth > 0


def once(path: str | os.PathLike, read: Callable[[Any], Any], kind: str = "checkpoint") -> Any:
    """`read(path)`, or inside `read_once` what was read before, if the file has not changed.

    Args:
        path: of the file.
        read: returns its content.
        kind: functions of the same kind return the same content.
    """
    if not _depth:
        return read(path)
    try:
        status = os.stat(path)
    except OSError:
        return read(path)  # it reports what is wrong
    key = (kind, os.path.realpath(path), status.st_mtime_ns, status.st_size)
    if key not in _kept:
        _kept[key] = read(path)
    return _kept[key]
