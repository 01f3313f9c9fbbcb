"""What cannot be read in the folders of runs is named and left out, so that one bad folder does not hide the others."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from semaim.errors import UserError

#: Errors of reading: strangers' files can be wrong in ways that no check foresees.
WRONG = (ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RecursionError, TypeError, ValueError)


class Skipped:
    """What was left out, each as one line that names the file and the reason."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        """Add a line, once."""
        line = " ".join(line.split())
        if line not in self.lines:
            self.lines.append(line)

    @contextmanager
    def trying(self, path: Path) -> Iterator[None]:
        """Context in which an error only leaves out what is being read of `path`."""
        try:
            yield
        except UserError as error:
            self.add(str(error))
        except WRONG as error:
            self.add(f"{path} cannot be read: {type(error).__name__}: {str(error)[:150]}")

    def nothing(self, what: str) -> UserError:
        """The error if everything was left out."""
        more = f" (and {len(self.lines) - 1} more)" if len(self.lines) > 1 else ""
        return UserError(f"no {what} can be read: {self.lines[0]}{more}")


def tell(lines: Iterable[str]) -> None:
    """Print what was left out to stderr."""
    for line in lines:
        print(f"skipped: {line}", file=sys.stderr)


def files_in(folder: Path, skipped: Skipped) -> Iterator[Path]:
    """Every file in a folder and its subfolders, sorted in each; links to folders are not followed.

    What has the name of a file but is none, such as a FIFO or a dangling link, is among them.
    """
    waiting = [str(folder)]  # no recursion: folders can be nested more deeply than Python's stack
    while waiting:
        here = waiting.pop()
        try:
            with os.scandir(here) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            skipped.add(f"{here[:200]}: {error.strerror}")
            continue
        for entry in entries:
            inside = entry.is_dir(follow_symlinks=False)
            if inside and not entry.name.isprintable():
                skipped.add(f"{entry.path!a}: a folder's name has control characters, or is no UTF-8")
            elif inside:
                waiting.append(entry.path)
            if not inside or entry.name == "results.json":  # a folder of that name is an error of its own
                yield Path(entry.path)
