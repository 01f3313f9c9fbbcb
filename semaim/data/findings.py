"""The findings of a check of a data set, and checking many files at once."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

EXAMPLES = 5  # kept of each kind
CHUNK = 16  # images a thread takes at a time
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and those of its values that swap width and height
SPLITS = {"train": "training", "val": "validation"}  # COCO's and ADE20K's names
StrPath = str | os.PathLike


@dataclass
class Finding:
    """One kind of problem or warning: its count and the first examples."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(example)


@dataclass
class Report:
    """The findings in `name`: lines of figures, and problems and warnings by kind."""

    name: str
    summary: list[str] = field(default_factory=list)
    problems: dict[str, Finding] = field(default_factory=dict)
    warnings: dict[str, Finding] = field(default_factory=dict)

    def problem(self, kind: str, example: str) -> None:
        """Add something that stops a training or makes it learn from wrong data."""
        self.problems.setdefault(kind, Finding()).add(example)

    def warning(self, kind: str, example: str) -> None:
        """Add something that does not stop a training."""
        self.warnings.setdefault(kind, Finding()).add(example)

    def __str__(self) -> str:
        lines = [self.name, *(f"  {line}" for line in self.summary)]
        for title, findings in (("problem", self.problems), ("warning", self.warnings)):
            for kind, finding in findings.items():
                lines += [f"  {title}: {kind}: {finding.count}", *(f"    {text}" for text in finding.examples)]
                if finding.count > len(finding.examples):
                    lines.append(f"    and {finding.count - len(finding.examples)} more")
        problems, warnings = (sum(f.count for f in group.values()) for group in (self.problems, self.warnings))
        found = [f"{n} {name}{'s'[: n > 1]}" for n, name in ((problems, "problem"), (warnings, "warning")) if n]
        return "\n".join([*lines, f"  {', '.join(found) or 'nothing wrong'}"])


Note = tuple[str, str]  # kind and example of a problem


def parallel(
    check: Callable, tasks: list, workers: int, progress: bool, title: str, pool: Executor | None = None
) -> list:
    """Run `check` on every task, results in order, in threads: Pillow decodes without the interpreter's lock.

    Another `pool` takes their place, and is shut down at the end.
    """
    chunks = [tasks[start : start + CHUNK] for start in range(0, len(tasks), CHUNK)]
    done = []
    pool = pool or ThreadPoolExecutor(max(1, workers))
    try:
        with progress_bar(title, len(tasks), progress) as advance:
            for results in pool.map(partial(_each, check), chunks):
                done += results
                advance(len(results))
    finally:
        pool.shutdown(cancel_futures=True)  # after an interrupt, wait only for the chunks that are running
    return done


@contextmanager
def progress_bar(title: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Context with a function that moves a bar on by so many; the bar is shown if the standard error is a terminal."""
    console = Console(stderr=True)  # whose own answer FORCE_COLOR changes, which notebooks set
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Lines printed meanwhile go above the bar; those of an output that is a file go there, and not to the terminal.
    above = bool(sys.stdout and sys.stdout.isatty())
    hidden = not (shown and console.file.isatty())
    with Progress(*columns, console=console, transient=True, disable=hidden, redirect_stdout=above) as bar:
        row = bar.add_task(title, total=total)
        yield lambda count: bar.advance(row, count)


def _each(check: Callable, chunk: list) -> list:
    return [check(task) for task in chunk]


def image_size(path: Path, whole: bool = True) -> tuple[int, int]:
    """(width, height) after EXIF rotation, as loaders see it; decodes the whole file and raises Pillow's errors."""
    with Image.open(path) as image:
        try:
            turned = image.getexif().get(ORIENTATION) in TURNED
        except Exception:  # damaged EXIF, which loaders ignore
            turned = False
        size = image.size[::-1] if turned else image.size
        if whole:
            image.draft(None, (1, 1))  # a JPEG is still read to its end, but decoded at an eighth of its width
            image.load()
    return size


def size_text(size: Iterable) -> str:
    """A size for a message: "640 x 480"."""
    return " x ".join(map(str, size))


def shortened(names: list[str], most: int = 8) -> str:
    """The first names of a list for a message, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
