"""A full or read-only disk: logs go on without their files, and the state of a run goes to another folder."""

import logging
import os
import threading
from pathlib import Path
from typing import Any, TypeVar

from semaim.checkpoints.files import CannotSave, run_in, write_checkpoint

_Logger = TypeVar("_Logger", bound=logging.Logger)


def write_or_rescue(state: dict, path: Path, rescue_dir: str | os.PathLike | None) -> None:
    """Write a checkpoint; if that fails, write it to `rescue_dir` instead.

    Raises:
        CannotSave: in both cases, since the run cannot go on; the message names the file that was written.
    """
    try:
        if not path.parent.is_dir():
            raise CannotSave(f"cannot save {path}: the work folder was removed or renamed")
        write_checkpoint(state, path)
    except CannotSave as error:
        if rescue_dir is None:
            raise
        other = Path(rescue_dir).resolve() / f"{path.resolve().parent.name}_{path.name}"
        run = state.get("saving", {}).get("run", "")
        if other.exists() and run_in(other) != run:  # of another run in a folder of the same name
            other = other.with_name(f"{other.stem}_{run[:8]}.pth")
        write_checkpoint(state, other)
        raise CannotSave(
            f"{str(error).partition(';')[0]}; the run's state is in {other}: continue with --resume {other} when there"
            " is space, or in another --work-dir"
        ) from None


def go_on(logger: _Logger) -> _Logger:
    """Have a logger that cannot write say so once for each file, in place of a traceback for each line."""
    for handler in logger.handlers:
        handler.handleError = _Once(handler)  # type: ignore[method-assign]
    return logger


class _Once:
    """`handleError` of a handler: one line."""

    def __init__(self, handler: logging.Handler):
        self.name, self.said = getattr(handler, "baseFilename", "the output"), False

    def __call__(self, record: logging.LogRecord) -> None:
        if not self.said:
            self.said = True
            _say(self.name)


class Tolerant:
    """A writer of scalars and pictures (mmengine's `vis_backend`) that a full disk does not make end the run."""

    def __init__(self, backend: Any):
        self.backend, self.said = backend, False

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.backend, name)
        return self._tolerant(found) if name.startswith(("add_", "close")) else found

    def _tolerant(self, method: Any) -> Any:
        def call(*arguments: Any, **keys: Any) -> Any:
            try:
                return method(*arguments, **keys)
            except OSError as error:
                if not self.said:
                    self.said = True
                    _say(f"{type(self.backend).__name__} in {self.backend._save_dir}", error.strerror)
                return None

        return call


def _quiet_threads(arguments: threading.ExceptHookArgs) -> None:
    """`threading.excepthook`, without the traceback of a TensorBoard thread: its error also comes to `Tolerant`."""
    written = isinstance(arguments.exc_value, OSError)
    if not (written and type(arguments.thread).__module__.startswith("tensorboard")):
        threading.__excepthook__(arguments)


threading.excepthook = _quiet_threads


def _say(name: str, reason: str | None = None) -> None:
    """One line on stderr, if that can be written."""
    reason = reason or "no space left, or the folder cannot be written"
    try:
        os.write(2, f"warning: cannot write {name}: {reason}; the run goes on without it\n".encode())
    except OSError:
        return  # it is full, too
