"""Reading files once, as a command checks its checkpoint and annotations for several things; JSON of runs' folders."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from semaim.errors import UserError

MOST_TEXT = 2**28  #: bytes of a text file in a run's folder; a log of 800 epochs has less than a tenth
MOST_JSON = 2**24  #: bytes of a JSON file in a run's folder
DEEPEST = 30  #: containers in containers of a JSON file
LARGEST = 1e100  #: numbers in a JSON file; the squares of larger ones are infinite

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


def read_text(path: Path, most: int = MOST_TEXT, errors: str = "replace") -> str:
    """The text of a file in a run's folder; `errors` says what is done with what is no UTF-8, as for `bytes.decode`.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is no regular file (opening a FIFO would wait for ever), too large, or cannot be read.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise UserError(f"{path} is no regular file")
        if size > most:
            raise UserError(f"{path} has {size:,} bytes: {most:,} are read at most")
        return path.read_bytes().decode("utf-8", errors)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a run's folder.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is none, cannot be read, or holds what no tool of the suite writes.
    """
    try:
        found = json.loads(read_text(path, MOST_JSON, "strict"))
        reason = strange(found)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:150]
    if reason:
        raise UserError(f"{path} is broken: {reason}")
    if not isinstance(found, dict):
        raise UserError(f"{path} is broken: it holds no object but a {type(found).__name__}")
    return found


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file of a run's folder so that after a kill it has its earlier content or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(values, indent=2, default=str) + "\n")
    os.replace(partial, path)


def strange(value: Any, depth: int = 0) -> str:
    """What is in plain values from a file that could not be printed or calculated with; empty if there is nothing."""
    if depth > DEEPEST:
        return f"it is nested more than {DEEPEST} deep"
    if isinstance(value, str):
        odd = next((sign for sign in value if not sign.isprintable() and sign not in "\n\t"), "")
        # Such as a surrogate, which has no coding, or an escape sequence, which a terminal obeys.
        return f"it has text with {odd!a}" if odd and ord(odd) < 0xA0 or odd and "\ud800" <= odd <= "\udfff" else ""
    if isinstance(value, int | float):
        return f"it has a number above {LARGEST:g}" if LARGEST < abs(value) < float("inf") else ""
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((reason for part in parts if (reason := strange(part, depth + 1))), "")
