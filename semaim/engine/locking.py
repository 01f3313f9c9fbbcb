"""One run at a time in a work folder."""

import datetime
import errno
import fcntl
import json
import os
import re
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from semaim.engine.launcher import SPAWNED
from semaim.errors import UserError, check_work_dir

LOCK = ".lock"  #: in a work folder in use

#: What a killed run may leave of a file that it was writing; the parts are those of `write_checkpoint` and others.
PARTIAL = re.compile(r"\.(.+\.(pth|json)\.\d+|latest|outcomes)\.partial")

#: The answers if another process holds a lock. File systems without locks, such as some of clusters, give others.
HELD = (errno.EAGAIN, errno.EACCES)


@contextmanager
def work_folder(name: str | os.PathLike) -> Iterator[None]:
    """Context in which no other run, on any machine that shares the folder's file system, may use this work folder.

    The lock is the operating system's, on a file that says who holds it. It ends with the process that holds it,
    however that ends: after a kill there is none to remove. Loader workers do not hold it, and of the processes of a
    launch only the first. On entry, unfinished files that a killed run has left are removed. While it is held, this
    process must not open the file again: closing any of its descriptors ends the lock.

    Raises:
        UserError: another run holds it; or the folder cannot be written.
    """
    node, rank = (os.environ.get(key, "0") != "0" for key in ("NODE_RANK", "RANK"))
    if SPAWNED in os.environ or node or rank:
        # What this run's first process has started may outlive it, and save: until then the folder is in use.
        with _shared(Path(name) / LOCK) if SPAWNED in os.environ and not node else nullcontext():
            yield
        return
    path = Path(name)
    made = [it for it in (path, *path.parents) if not it.exists()]
    check_work_dir(path)
    file = _locked(path)
    try:
        for left in path.iterdir():
            if PARTIAL.fullmatch(left.name):
                left.unlink(missing_ok=True)
        yield
    finally:
        with suppress(OSError):  # the folder may be gone, or on a disk that has failed
            (path / LOCK).unlink(missing_ok=True)
            for folder in made:
                folder.rmdir()  # fails unless nothing has come of it, such as after a misspelt flag
        os.close(file)


@contextmanager
def _shared(path: Path) -> Iterator[None]:
    """Context in which this process holds the second byte of the lock file, together with others of its launch."""
    file = None
    with suppress(OSError):  # none, or on a file system without locks
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 1)
    try:
        yield
    finally:
        if file is not None:
            os.close(file)


def _locked(folder: Path) -> int:
    """The descriptor of the folder's lock file, which this process holds now."""
    path = folder / LOCK
    for tries in range(100):  # some file systems never give a path and its descriptor the same number
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            # POSIX's: unlike flock's, a forked worker does not hold it too, and it works over NFS.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 2)
            fcntl.lockf(file, fcntl.LOCK_UN, 1, 1)  # for `_shared`
        except OSError as error:
            if error.errno in HELD:
                held = os.read(file, 4096)
                os.close(file)
                raise UserError(
                    f"{folder} is in use by {_holder(held)}: wait for it, or choose another --work-dir"
                ) from None
            print(f"{folder} is on a file system without locks: start no second run in it", file=sys.stderr)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file)):
                break
        if tries < 99:
            os.close(file)  # another run has just ended and removed it
    started = datetime.datetime.now().isoformat(" ", "seconds")
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": started, "command": shlex.join(sys.argv)}
    with suppress(OSError):  # a full disk: the message of a second run knows less then
        os.ftruncate(file, 0)
        os.write(file, json.dumps(holder).encode())
    return file


def _holder(content: bytes) -> str:
    """Who holds a lock, from its file."""
    try:
        held = json.loads(content)
        command = str(held["command"])
        short = command if len(command) <= 100 else f"{command[:100]}..."
        return f"process {held['pid']} on {held['host']}, started {held['started']} ({short})"
    except (ValueError, KeyError, TypeError):
        return "another run"
