"""Pools of processes that do not outlive the one that has started them, and locks of folders that processes fill."""

import fcntl
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any


def process_pool(
    workers: int, method: str | None = None, begin: Callable[..., Any] | None = None, *given: Any
) -> ProcessPoolExecutor:
    """A pool whose processes end when this process ends, even by kill -9.

    Those of a plain one would then wait forever: each holds the other end of the pipe that they all read.

    Args:
        workers: number of processes.
        method: how they are started, such as "spawn"; None for Python's default.
        begin, given: called in each process at its start, with these arguments.
    """
    context = multiprocessing.get_context(method)
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(begin, given))


def _begin(begin: Callable[..., Any] | None, given: tuple) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if begin:
        begin(*given)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """Context in which this process holds a folder's lock; OSError if another does, or the file system has none."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
