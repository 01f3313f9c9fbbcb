"""A tool as a user types it: started, watched, killed where it has reached something, and what then has to hold."""

import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from commands import CPU, ROOT

MARK = "SEMAIM_ATTACK"  #: environment variable by which a run's processes are found, whoever their parent is
PATIENCE = 1800  #: seconds until a run that should end counts as hanging, as in `commands.tool`

STEP = re.compile(r"\[\d+/\d+\] +loss |iteration +\d+/\d+ +loss ")
SAVED = re.compile(r"INFO - saved (\S+)")
VALIDATED = re.compile(r"\(val\)")


def alive(mark: str) -> list[int]:
    """Numbers of the processes that have this mark in their environment. A zombie's is empty."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"{MARK}={mark}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def partials(folder: Path) -> list[str]:
    """Names of the half-written files and folders in a folder and all folders in it."""
    return sorted(path.name for pattern in ("*partial*", ".*.part") for path in folder.rglob(pattern))


def tool_line(name: str, *arguments: object) -> list[str]:
    """The command line of a tool."""
    return [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]


class Attempt:
    """A run in a session of its own, whose lines are read while it goes on.

    Args:
        line: the command.
        folder: its work folder, which need not exist.
        temporary: its TMPDIR, whose content is counted; made here.
    """

    def __init__(self, line: list[str], folder: Path, temporary: Path):
        self.folder, self.mark, self.rows = folder, uuid.uuid4().hex, []
        self.begun, self.names = time.monotonic(), set(self.listed())
        temporary.mkdir(parents=True, exist_ok=True)
        self.temporary = temporary
        # pytest's folders are too long for the sockets of loaders' workers.
        self.short = Path(tempfile.gettempdir()) / f"attempt-{self.mark[:8]}"
        self.short.symlink_to(temporary)
        environment = {**os.environ, **CPU, MARK: self.mark, "TMPDIR": str(self.short)}
        self.process = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=ROOT,
            env=environment, start_new_session=True,
        )  # fmt: skip
        self.reader = threading.Thread(target=lambda: self.rows.extend(self.process.stdout), daemon=True)
        self.reader.start()

    def listed(self) -> list[str]:
        """Names in the work folder."""
        with suppress(FileNotFoundError):
            return os.listdir(self.folder)
        return []

    def listed_temporary(self) -> list[str]:
        """Names in its TMPDIR."""
        return os.listdir(self.temporary)

    def count(self, pattern: re.Pattern) -> int:
        """Number of lines so far that hold a pattern."""
        return sum(bool(pattern.search(row)) for row in list(self.rows))

    def until(self, reached: Callable[["Attempt"], bool], delay: float) -> bool:
        """Wait for something and `delay` seconds more; whether the run was still going on then."""
        while not reached(self):
            if self.process.poll() is not None:
                return False
            if time.monotonic() - self.begun > PATIENCE:
                raise AssertionError(f"hangs after {PATIENCE} s:\n{self.tail()}")
            time.sleep(0.0003)  # a checkpoint is written in some 10 ms
        if delay:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(delay)
        return self.process.poll() is None

    def kill(self, victim: str, rng: random.Random) -> None:
        """kill -9 of "tool", the process typed; of "all" processes; or of "child", one that the tool has started."""
        others = [number for number in alive(self.mark) if number != self.process.pid]
        chosen = {"tool": [], "all": others, "child": [rng.choice(others)] if others else []}[victim]
        if victim != "child" or not others:
            self.process.kill()
        for number in chosen:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)

    def wait(self) -> int:
        """The exit status, once the tool has ended; its lines are complete when no process holds the pipe."""
        try:
            status = self.process.wait(PATIENCE)
            self.reader.join(60)
            return status
        except subprocess.TimeoutExpired:
            raise AssertionError(f"hangs after {PATIENCE} s:\n{self.tail()}") from None
        finally:
            self.left = self.processes_left()
            self.short.unlink(missing_ok=True)
            for number in self.left:
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            self.process.stdout.close()

    def processes_left(self, seconds: float = 20) -> list[str]:
        """Command lines of the processes that are still there some seconds after the tool's end."""
        end = time.monotonic() + seconds
        while (numbers := alive(self.mark)) and time.monotonic() < end:
            time.sleep(0.05)
        return numbers

    def tracebacks(self) -> int:
        """Number of tracebacks printed, without those of Python's resource tracker.

        That process has no part in the work. If it is killed, Python starts another, which complains of each semaphore
        that it has not seen made; what the tool does is not affected.
        """
        begun = [number for number, row in enumerate(self.rows) if "Traceback" in row]
        frames = ["".join(self.rows[number + 1 : number + 2]) for number in begun]
        return sum("multiprocessing/resource_tracker.py" not in frame for frame in frames)

    def tail(self, rows: int = 15) -> str:
        """The last lines printed."""
        return "".join(self.rows[-rows:])


# Where a kill falls. Each takes what an earlier whole run took until its first step, and gives a condition and a delay.


def starting(rng: random.Random, start: float):
    """At any time of the imports, checks and building."""
    return lambda attempt: True, rng.uniform(0, start)


def stepping(rng: random.Random, start: float):
    """After one of the first steps, and up to some steps more."""
    number = rng.randint(1, 6)
    return lambda attempt: attempt.count(STEP) >= number, rng.uniform(0, 0.05)


def saving(rng: random.Random, start: float):
    """While a checkpoint is being written."""

    def half(attempt: Attempt) -> bool:
        names = set(attempt.listed()) - attempt.names
        return any("partial" in name and ".pth" in name for name in names)

    return half, rng.uniform(0, 0.004)


def rotating(rng: random.Random, start: float):
    """When a checkpoint has just got its name: latest.pth is pointed at it, and old ones are deleted."""
    number = rng.randint(1, 4)

    def named(attempt: Attempt) -> bool:
        names = set(attempt.listed()) - attempt.names
        return sum(bool(re.fullmatch(r"(epoch|iter)_\d+\.pth", name)) for name in names) >= number

    return named, rng.uniform(0, 0.006)


def validating(rng: random.Random, start: float):
    """In a validation."""
    number = rng.randint(1, 4)
    return lambda attempt: attempt.count(VALIDATED) >= number, rng.uniform(0, 0.1)


def finishing(rng: random.Random, start: float):
    """After the last step: in the last validation, and while results are written."""
    last = re.compile(r"(\b(\d+)/\2 \[(\d+)/\3\]|iteration (\d+)/\4) +loss ")
    return lambda attempt: attempt.count(last) >= 1, rng.uniform(0, 0.4)


def measured(rng: random.Random, start: float):
    """When results.json is being written, or just was."""
    return lambda attempt: any("results" in name for name in set(attempt.listed()) - attempt.names), rng.uniform(
        0, 2e-3
    )


def stored(rng: random.Random, start: float):
    """When a run says that it has saved, whichever of several."""
    number = rng.randint(1, 4)
    return lambda attempt: attempt.count(SAVED) >= number, rng.uniform(0, 0.05)


def whole_run(line: list[str], folder: Path, temporary: Path) -> tuple[Attempt, float]:
    """An uninterrupted run that has to succeed, and the seconds until its first step."""
    attempt = Attempt(line, folder, temporary)
    attempt.until(lambda it: it.count(STEP) >= 1, 0)
    start = time.monotonic() - attempt.begun
    assert attempt.wait() == 0, attempt.tail(40)
    return attempt, start


def chosen(rng: random.Random, weights: dict[Callable, int]) -> Callable:
    """A spot, by the weights."""
    return rng.choices(list(weights), list(weights.values()))[0]


def tally(names: Iterable[str]) -> dict[str, int]:
    """How often each name occurs."""
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))
