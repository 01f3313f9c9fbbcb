"""Errors that the user can fix: one clear line and a non-zero exit status, no traceback."""

import difflib
import errno
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

#: System errors of a disk without space.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: System errors where the user may not write a folder or file, or the disk is full.
REFUSALS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, *FULL
)  # fmt: skip

#: Packages of the environment that every command needs.
NEEDED = ("torch", "mmengine", "timm", "numpy")


class UserError(Exception):
    """An input is wrong: the message says what, where, and what to do."""

    status = 2  #: a command's exit status


class Diverged(UserError):
    """The loss is NaN or infinite."""

    status = 3  # a learning rate sweep continues with the next run


class Stopped(KeyboardInterrupt):
    """A signal has stopped a command; `status` is 128 and the signal's number, as in a shell."""

    def __init__(self, number: int):
        super().__init__()
        self.status = 128 + number


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest known ones, each once, or all of them."""
    known = sorted(set(known))
    near = close(name, known)
    return f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known) or 'none'}"


def close(name: str, known: Iterable[str], cutoff: float = 0.5) -> list[str]:
    """At most three known names that look like this one or contain it as a part; the nearest first."""
    known = sorted(set(known))
    near = difflib.get_close_matches(name, known, n=3, cutoff=cutoff)
    return near or [other for other in known if name and name in other.split("_")][:3]


def check_work_dir(folder: str | os.PathLike, flag: str = "--work-dir") -> None:
    """Create a run's folder, if need be; `UserError` if it cannot be written, which names the flag for another."""
    there, kind = Path(folder).absolute(), flag.strip("-").replace("-dir", " folder")
    try:
        str(there).encode()
    except UnicodeEncodeError:  # logs and results could not name it
        raise UserError(f"the path of the {kind}, {str(there)!a}, is not UTF-8: name another {flag}") from None
    try:
        there.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        file = os.path.exists(folder) and not os.path.isdir(folder)
        reason = "it is a file" if file else error.strerror or error
        raise UserError(f"cannot write to the {kind} {folder}: {reason}; name another {flag}") from None


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Create the folder of the --out file; `UserError` if the folder or the file cannot be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"cannot write --out {out}: {error.strerror or error}") from None


def run(main: Callable[[], int | None]) -> int:
    """Run a command's `main`; returns the exit status.

    0, a `UserError`'s (also outside of the environment), 128 and a signal's number after one has stopped it (130 after
    Ctrl-C), 141 after a closed pipe.
    """
    try:
        code = main() or 0
        if sys.stdout:  # none with `>&-`
            sys.stdout.flush()
        return code
    except ModuleNotFoundError:
        if not (missing := _missing()):
            raise
        print(f"error: {missing}", file=sys.stderr)
        return UserError.status
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        _drop_output()
        return 141
    except UserError as error:
        # From a data loader's worker the message arrives wrapped in that worker's traceback.
        print(f"error: {str(error).rsplit('UserError: ', 1)[-1].strip()}", file=sys.stderr)
        return error.status
    except OSError as error:  # of a folder that no check has covered
        if error.errno not in (REFUSALS if error.filename else FULL):
            raise
        if not error.filename:  # perhaps the output's
            _drop_output()
        print(f"error: {error.filename or 'a file, or the output'}: {error.strerror}", file=sys.stderr)
        return UserError.status
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        return getattr(error, "status", 130)


def _missing() -> str:
    """What to do where this Python lacks a package that every command needs; "" where it has them."""
    lacking = [name for name in NEEDED if find_spec(name) is None]
    if not lacking:
        return ""
    from semaim.places import IN_CHECKOUT, ROOT, here

    environment = ROOT / ".venv"
    if not IN_CHECKOUT:
        todo = "install the suite with its requirements: pip install semaim"
    elif not environment.is_dir() or Path(sys.prefix).resolve() == environment.resolve():
        todo = f"run {here(ROOT / 'tools/setup.sh')}, then source {here(environment / 'bin/activate')}"
    else:
        todo = f"activate the environment: source {here(environment / 'bin/activate')}"
    return f"{sys.executable} has no {lacking[0]}: {todo}"


def _drop_output() -> None:
    """Have Python not complain again, at its end, about output that cannot be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
