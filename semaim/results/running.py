"""Shared by tools that start others: running a command, continuing an interrupted one, refusing changed settings."""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmengine.config import Config

from semaim.engine.launcher import end_with_parent
from semaim.engine.watching import STOPS
from semaim.errors import UserError
from semaim.places import IN_CHECKOUT, ROOT, here
from semaim.reading import read_json


def python() -> str:
    """This Python as it would be typed here."""
    return here(Path(sys.executable))


def tool(name: str) -> list[str]:
    """The start of a tool's command line: this Python and tools/NAME.py, or the installed command NAME."""
    start = [here(ROOT / "tools" / f"{name}.py")] if IN_CHECKOUT else ["-m", "semaim.cli", name]
    return [python(), *start]


def read(path: Path) -> dict:
    """The content of a JSON file; empty if there is no file, `UserError` if it is broken."""
    try:
        return read_json(path)
    except FileNotFoundError:
        return {}


def settings_in(path: Path) -> dict | None:
    """The settings of the earlier run in a stage.json or sweep.json; None if there are none, `UserError` if broken."""
    had = read(path).get("settings")
    if had is not None and not (isinstance(had, dict) and isinstance(had.get("options"), dict)):
        raise UserError(f"{path} is broken: settings is {had!r:.60}")
    return had


def refuse_changes(folder: Path, had: dict, settings: dict) -> None:
    """`UserError` if a folder's run had other settings: a table must not mix them.

    Args:
        folder: of the run.
        had, settings: plain values, of the earlier run and now; their `options` are dicts of plain values.
    """
    old, new = ({**part, **part["options"], "options": None} for part in (had, settings))
    for key in [*new, *old]:
        if old.get(key) != new.get(key):
            change = f"{key} = {old.get(key)}, now it is {new.get(key)}"
            raise UserError(f"{folder} was run with {change}: choose another --work-dir")


def as_words(options: dict[str, object]) -> dict[str, str]:
    """Options in the form of --cfg-options, without spaces."""
    return {key: str(value).replace(" ", "") for key, value in options.items()}


class Children:
    """Context for running commands: a signal to this process is passed on to all of them, so that they save.

    If an error leaves the context, they are ended too.

    Attributes:
        stopped: the received signals.
    """

    def __init__(self) -> None:
        self.running: dict[subprocess.Popen, int] = {}  # number of signals that each has been sent
        self.stopped: list[int] = []
        self.lock = threading.RLock()  # a signal handler runs in the main thread, which may hold the lock

    def __enter__(self) -> "Children":
        # Ignored signals stay ignored, as with nohup.
        self.before = {n: signal.signal(n, self.stop) for n in STOPS if signal.getsignal(n) != signal.SIG_IGN}
        return self

    def __exit__(self, kind: type | None, *error) -> None:
        if kind:
            self.stop(signal.SIGTERM)
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def stop(self, number: int, frame=None) -> None:
        """Stop all commands, after they have saved."""
        self.stopped.append(number)
        for child in list(self.running):
            self.pass_on(child)

    def pass_on(self, child: subprocess.Popen) -> None:
        """Pass the last signal on, once: a second one would interrupt the saving."""
        with self.lock:
            new = self.running.get(child, len(self.stopped)) < len(self.stopped)
            if new:
                self.running[child] = len(self.stopped)
        if new:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGINT if self.stopped[-1] == signal.SIGINT else signal.SIGTERM)

    def follow(self, line: list[str], title: str = "", environment: dict[str, str] | None = None) -> int:
        """Run a command to its end; returns its exit status. With a title, which prefixes its lines, in any thread."""
        if self.stopped:
            return 128 + self.stopped[0]
        # In its own session: a second Ctrl-C, from the terminal, would interrupt its saving. And it ends with this
        # process, which may be killed before it can pass a signal on.
        piped: dict[str, Any] = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
            "errors": "replace",
        }
        child = subprocess.Popen(
            line,
            start_new_session=True,
            preexec_fn=end_with_parent,
            env={**os.environ, **(environment or {})},
            **(piped if title else {}),
        )
        self.running[child] = 0
        self.pass_on(child)  # for a signal that came while it was being started
        try:
            for text in child.stdout or ():
                # In one write, with the newline that a last line may lack, as other threads print too.
                print(f"[{title}] {text.rstrip()}\n", end="", flush=True)
        except BaseException:  # its output can no longer be read
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
            raise
        finally:
            if child.stdout:
                child.stdout.close()
            code = child.wait()
            with self.lock:
                del self.running[child]
        return code if code >= 0 else 128 - code


def follow(line: list[str]) -> tuple[int, int]:
    """Run a command to its end; returns its exit status, and the first signal that came, which is passed on, or 0."""
    with Children() as children:
        code = children.follow(line)
    return code, next(iter(children.stopped), 0)


def shortened(cfg: Config, iters: int | None = None, epochs: int | None = None) -> dict[str, object]:
    """Options that give a run another length, with a validation at its end; empty if no length is given."""
    if iters is not None:
        unit, length = "max_iters", iters
    elif epochs is not None:
        unit, length = "max_epochs", epochs
    else:
        return {}
    if unit not in cfg.train_cfg:
        raise UserError(f"the config has no {unit}: give {'--iters' if iters is None else '--epochs'} N")
    if length < 1:
        raise UserError(f"a run of {length} {unit[4:]}: give 1 or more")
    options: dict[str, object] = {f"train_cfg.{unit}": length}
    if cfg.model.type != "Pretraining":  # it has no validation
        options["train_cfg.val_interval"] = length
    return options
