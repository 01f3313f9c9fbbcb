"""Checkpoint files that contain only tensors and plain containers, and are written atomically."""

import errno
import glob
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from semaim.checkpoints.plain_pickle import Broken
from semaim.checkpoints.storages import Damaged, load_torch
from semaim.errors import UserError
from semaim.reading import keeping, once

FORMAT = "semaim"  #: value of a checkpoint's `format`

NUMBERED = re.compile(r"(epoch|iter)_\d+\.pth")  #: names of the checkpoints that a run saves at intervals


class CannotSave(UserError):
    """A checkpoint could not be written."""


def plain(value: Any) -> Any:
    """`value` as dicts, lists and tuples, which `weights_only=True` can read back, with its tensors on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value) if type(value) in (list, tuple) else list(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint holds no {type(value).__name__}: {value!r}")


def remove_partials(path: Path) -> None:
    """Remove what killed processes have left that were writing this file."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        left.unlink(missing_ok=True)


def write_checkpoint(checkpoint: dict, path: str | os.PathLike) -> None:
    """Write a checkpoint atomically: after a kill or on a full disk the previous file is intact."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_partials(path)
        with open(partial, "wb") as file:
            torch.save(plain(checkpoint), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch wraps the file's OSError in a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__ or error.__cause__
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = "no space left on the disk" if full else str(cause or error)
        raise CannotSave(f"cannot save {path}: {reason}; earlier checkpoints are whole: use --resume") from None
    finally:
        with suppress(OSError):  # its folder may be none
            partial.unlink(missing_ok=True)


def read_checkpoint(path: str | os.PathLike, mmap: bool = False) -> dict:
    """Read one of our own checkpoints to the CPU; `UserError` for any other file.

    Args:
        path: of the file.
        mmap: read tensors from the file only when they are used, to look at the rest quickly.
    """
    try:
        mapped = mmap and not keeping()
        checkpoint = once(path, lambda it: load_torch(Path(it), _plain_only, mapped))
    except FileNotFoundError:
        raise UserError(f"no such checkpoint: {path}") from None
    except Damaged:
        raise
    except Exception as error:  # unpickling and zip errors are of many types
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        reason = "".join(sign if sign.isprintable() else "?" for sign in reason)
        raise UserError(f"{path} is not a semaim checkpoint: {reason}") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        held = ", ".join(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise UserError(f"{path} is not a semaim checkpoint: it holds {held[:150]}")
    return checkpoint


def run_in(path: str | os.PathLike) -> str | None:
    """The name of the run in one of our checkpoints, which is not kept; None if it has none, or cannot be read."""
    with suppress(Exception):  # of many types, as above
        return load_torch(Path(path), _plain_only, mapped=True)["saving"]["run"]
    return None


def _plain_only(name: str) -> type:
    raise Broken(f"no file of tensors and plain containers, it holds {name}")


def newest_checkpoint(work_dir: str | os.PathLike) -> Path | None:
    """The checkpoint that a work folder's latest.pth names, or None; `UserError` if it, or that link, is missing."""
    folder = Path(work_dir)
    latest = folder / "latest.pth"
    if latest.exists():
        return latest
    left = numbered(folder)
    if not left and not latest.is_symlink():
        return None
    lost = (
        f"{latest} names {os.readlink(latest)}, which is"
        if latest.is_symlink()
        else f"{folder} has no latest.pth, which is"
    )
    if not left:
        raise UserError(f"{lost} not there, and no other checkpoint: put it back, or choose another --work-dir")
    raise UserError(f"{lost} not there: name the checkpoint to continue from, such as --resume {left[-1]}")


def numbered(folder: str | os.PathLike) -> list[Path]:
    """The checkpoints that a run has saved at intervals in its folder, the newest last."""
    found = [path for path in Path(folder).glob("*_*.pth") if NUMBERED.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)
