"""Errors that are the user's to mend: one clear line and a non-zero exit, no traceback."""

import difflib
import errno
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

#: What the system refuses where a folder or file is not the user's to write, or the disk is full.
REFUSALS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.ENAMETOOLONG,
)  # fmt: skip


class UserError(Exception):
    """Something given is wrong: the message says what, where, and what to do."""

    status = 2  #: a command's exit status


class Diverged(UserError):
    """The loss is NaN or infinite."""

    status = 3  # a search of learning rates goes on with the next


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest known ones, each once, or all of them."""
    known = sorted(set(known))
    near = close(name, known)
    return f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known) or 'none'}"


def close(name: str, known: Iterable[str], cutoff: float = 0.5) -> list[str]:
    """At most three known names that look like this one, or of which it is a part; the nearest first."""
    known = sorted(set(known))
    near = difflib.get_close_matches(name, known, n=3, cutoff=cutoff)
    return near or [other for other in known if name and name in other.split("_")][:3]


def check_work_dir(folder: str | os.PathLike, make: bool = True) -> None:
    """`UserError` where a run could not write into its work folder.

    Args:
        folder: it and those above it may not be there yet.
        make: make it; else the nearest folder above it that is there is looked at.
    """
    there = Path(folder).absolute()
    try:
        if make:
            there.mkdir(parents=True, exist_ok=True)
        while not os.path.lexists(there) and there != there.parent:
            there = there.parent
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        file = os.path.exists(folder) and not os.path.isdir(folder)
        reason = "it is a file" if file else error.strerror or error
        raise UserError(f"cannot write to the work folder {folder}: {reason}; name another --work-dir") from None


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Makes the folder of the file that --out names; a `UserError` where the folder or the file cannot be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"cannot write --out {out}: {error.strerror or error}") from None


def run(main: Callable[[], int | None]) -> int:
    """Run a command's `main`; exit status 0, a `UserError`'s, 130 after an interrupt, 141 after a closed pipe."""
    try:
        code = main() or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read, as `head` does, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains again at its end
        return 141
    except UserError as error:
        # From a data loader's worker the message arrives wrapped in that worker's traceback.
        print(f"error: {str(error).rsplit('UserError: ', 1)[-1].strip()}", file=sys.stderr)
        return error.status
    except OSError as error:  # a folder that nothing had looked at before
        if error.errno not in REFUSALS or not error.filename:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return UserError.status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
