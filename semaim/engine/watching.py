"""Which process a run waits for: each reports, in a thread, that it lives and how far it has come."""

import json
import os
import signal
import socket
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from semaim.errors import REFUSALS, UserError

TIMEOUT = 1800  #: s, the default of --timeout
#: Signals that stop a run: Ctrl-C, a scheduler's, a closed terminal's, and the one that announces the end of a job.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
TIMED_OUT = 124  #: exit status, that of `timeout`
_SHARED_MEMORY = ("unable to write to file </torch_", "unable to open shared memory", "unable to mmap", "/torch_")
_LIKELY: dict[int, str] = {
    signal.SIGKILL: "most likely the machine ran out of memory, or the scheduler ended it: lower num_workers or"
    " --cfg-options images_per_gpu=N",
    signal.SIGBUS: "most likely the shared memory (/dev/shm) is full: lower num_workers, or enlarge it (docker run"
    " --shm-size=16g)",
    signal.SIGTERM: "somebody, or the scheduler, ended it",
    signal.SIGABRT: "a library has given up: its message is above",
    signal.SIGSEGV: "a library has crashed",
}


class Ended(UserError):
    """A process of the run was ended by a signal; `status` is 128 and its number, as in a shell."""

    def __init__(self, text: str, number: int):
        super().__init__(text)
        self.status = 128 + number


def named(number: int) -> str:
    """A signal's name."""
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time one
        return f"signal {number}"


def ended_by(what: str, number: int) -> Ended:
    """The error that says which process a signal has ended, and what is likely."""
    likely = _LIKELY.get(number)
    return Ended(f"{what} was ended by {named(number)}" + (f": {likely}" if likely else ""), number)


def explained(error: Exception) -> UserError | None:
    """A data loader's failure in one line: a worker that a signal has ended, or a full /dev/shm; None for any other."""
    text = str(error)
    gone = isinstance(error, ConnectionError | EOFError) or "DataLoader worker" in text  # it also hands over files
    frames = traceback.walk_tb(error.__traceback__) if gone else ()
    held = [worker for frame, _ in frames for worker in getattr(frame.f_locals.get("self"), "_workers", ())]
    end = time.monotonic() + 2
    while held and all(worker.is_alive() for worker in held) and time.monotonic() < end:
        time.sleep(0.05)  # it is about to end
    for worker in held:
        if (worker.exitcode or 0) < 0:
            return ended_by(f"a data loader's worker (process {worker.pid})", -worker.exitcode)
    for number in _LIKELY:
        if f"is killed by signal: {signal.strsignal(number)}" in text:
            return ended_by("a data loader's worker", number)
    batch = any(part in text for part in _SHARED_MEMORY) and ("No space left" in text or "Cannot allocate" in text)
    if batch or isinstance(error, OSError) and error.errno in REFUSALS and _of_loader(error):
        return UserError(
            "the shared memory (/dev/shm), through which workers hand over images, is full or read-only: lower"
            " num_workers (--cfg-options num_workers=0 needs none), or enlarge it (docker run --shm-size=16g)"
        )
    return None


def _of_loader(error: Exception) -> bool:
    """Whether an error comes from the start of a loader's workers; its iterator is not to complain again."""
    made = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    for iterator in made:
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown = True
            return True
    return False


@dataclass
class Heard:
    """What is known of a process.

    Attributes:
        report: its last one: beat, moves, position, place, name.
        beat_at, moved_at: s, when a report came, and when one of progress came.
    """

    report: tuple[int, int, int, str, str]
    beat_at: float
    moved_at: float


class Watch:
    """Says which process the others wait for, and ends this one if that lasts longer than `timeout`.

    A process is waited for if it no longer reports, or if it is the one whose position is the smallest and has made no
    progress: every batch of a training, validation or test, every checkpoint and every picture is progress, and the
    first iteration includes a compilation. Process 0 watches all; the others watch process 0.

    Args:
        store: of the process group.
        rank, world: of this process, and number of processes.
        timeout: s.
    """

    def __init__(self, store: torch.distributed.Store, rank: int, world: int, timeout: float):
        self.rank, self.world, self.timeout = rank, world, timeout
        # A connection of its own: the main thread may be waiting in the other. Before torch 2.8 there is only one.
        self.store = store.clone() if hasattr(store, "clone") else store
        self.period = min(5.0, timeout / 40)
        self.moves = self.position = 0
        self.place = "the start"
        self.name = f"process {os.getpid()} on {socket.gethostname()}"
        self.closed = threading.Event()
        now = time.monotonic()
        peers = range(world) if rank == 0 else (0,)
        self.heard = {peer: Heard((-1, -1, 0, self.place, "not yet there"), now, now) for peer in peers}
        self.said = timeout / 10  # s: with half an hour, the first line comes after three minutes
        for work in (self.exchange, self.judge):
            threading.Thread(target=work, daemon=True, name=f"semaim-{work.__name__}").start()

    def exchange(self) -> None:
        """Report, and hear reports; blocks if the store's process is stopped, which `judge` finds."""
        beat = 0
        while not self.closed.wait(self.period):
            beat += 1
            with suppress(RuntimeError):  # the store's process has ended
                report = [beat, self.moves, self.position, self.place, self.name]
                self.store.set(f"semaim/at/{self.rank}", json.dumps(report))
                for peer in self.heard:
                    if self.store.check([f"semaim/at/{peer}"]):
                        self.hear(peer, json.loads(self.store.get(f"semaim/at/{peer}")))

    def hear(self, peer: int, report: list) -> None:
        """Take note of a report."""
        heard, now = self.heard[peer], time.monotonic()
        if report[0] != heard.report[0]:
            heard.beat_at = now
        if report[1] != heard.report[1]:
            heard.moved_at = now
        heard.report = tuple(report)

    def judge(self) -> None:
        """Say for whom the run waits, at a tenth of `timeout` and whenever that has doubled; end it at the limit."""
        last = time.monotonic()
        while not self.closed.wait(self.period):
            now = time.monotonic()
            if now - last > 10 * self.period:  # this process was stopped itself, perhaps with all others
                for heard in self.heard.values():
                    heard.beat_at = heard.moved_at = now
            last = now
            seconds, text = self.waiting(now)
            if seconds < self.timeout / 10:
                self.said = self.timeout / 10
            elif seconds >= self.timeout:
                self.say(f"error: {text}: longer than --timeout {self.timeout:g}, so the run ends")
                os._exit(TIMED_OUT)  # the main thread may be in a collective that never ends
            elif seconds >= self.said:
                self.say(f"{text}; after {self.timeout:g} s (--timeout) the run ends")
                self.said *= 2

    def waiting(self, now: float) -> tuple[float, str]:
        """Seconds since the last sign of the process that is waited for, and a text."""
        silent = max(self.heard, key=lambda peer: now - self.heard[peer].beat_at)
        since = now - self.heard[silent].beat_at
        if since > self.timeout / 10:
            name = f"rank {silent} ({self.heard[silent].report[4]})"
            return since, f"{name} has not reported for {since:.0f} s: it is stopped or has ended, or its machine hangs"
        if self.rank:
            return 0, ""  # process 0 lives, and judges
        least = min(heard.report[2] for heard in self.heard.values())
        behind = {peer: heard for peer, heard in self.heard.items() if heard.report[2] == least}
        since = min(now - heard.moved_at for heard in behind.values())
        places = ", ".join(f"rank {peer} ({it.report[4]}) in {it.report[3]}" for peer, it in list(behind.items())[:4])
        others = "" if len(behind) == self.world else "; the others wait for it"
        return since, f"no progress for {since:.0f} s: {places}{others}"

    def say(self, text: str) -> None:
        """Write a line to the terminal, from the lowest process that knows."""
        if self.rank < 2:
            with suppress(OSError):
                os.write(2, f"{text}\n".encode())


_watch: Watch | None = None


def watch(timeout: float) -> None:
    """Begin to watch, in each process of a group."""
    global _watch
    store = torch.distributed.distributed_c10d._get_default_store()
    _watch = Watch(store, torch.distributed.get_rank(), torch.distributed.get_world_size(), timeout)


def unwatch() -> None:
    """End it, before the group ends."""
    global _watch
    if _watch:
        _watch.closed.set()
    _watch = None


def progress(place: str, position: int | None = None) -> None:
    """Report that this process has begun with `place`.

    Args:
        place: in words.
        position: the same in every process, and growing; None for what only some processes do.
    """
    if _watch:
        _watch.place = place
        if position is not None:
            _watch.position = position
        _watch.moves += 1
