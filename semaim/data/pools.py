"""Pools of processes that do not outlive the one that has started them."""

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
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
