"""What tools that start others share: following a command, going on where it was cut, refusing changed settings."""

import json
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
from semaim.errors import UserError
from semaim.places import IN_CHECKOUT, ROOT, here


def python() -> str:
    """This Python as one would type it here."""
    return here(Path(sys.executable))


def tool(name: str) -> list[str]:
    """The start of a tool's command line: this Python and tools/NAME.py, or the installed command NAME."""
    start = [here(ROOT / "tools" / f"{name}.py")] if IN_CHECKOUT else ["-m", "semaim.cli", name]
    return [python(), *start]


def read(path: Path) -> dict:
    """The content of a json file, empty where there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def refuse_changes(folder: Path, had: dict, settings: dict) -> None:
    """`UserError` where a folder's run had other settings: one table must not hold both.

    Args:
        folder: of the run.
        had, settings: plain values, of the run and asked for now; their `options` are a dict of such.
    """
    old, new = ({**part, **part["options"], "options": None} for part in (had, settings))
    for key in [*new, *old]:
        if old.get(key) != new.get(key):
            change = f"{key} = {old.get(key)}, now it is {new.get(key)}"
            raise UserError(f"{folder} was run with {change}: choose another --work-dir")


def as_words(options: dict[str, object]) -> dict[str, str]:
    """Options as --cfg-options takes them: no spaces."""
    return {key: str(value).replace(" ", "") for key, value in options.items()}


class Children:
    """Commands that run now; within it, a signal to this process is passed on to all of them, for them to save.

    An error that leaves it ends them too.

    Attributes:
        stopped: the signals that came.
    """

    def __init__(self) -> None:
        self.running: dict[subprocess.Popen, int] = {}  # how many of the signals each has been sent
        self.stopped: list[int] = []
        self.lock = threading.RLock()  # a signal's handler runs in the main thread, which may hold it

    def __enter__(self) -> "Children":
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        # One that is ignored stays so, as by nohup.
        self.before = {n: signal.signal(n, self.stop) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
        return self

    def __exit__(self, kind: type | None, *error) -> None:
        if kind:
            self.stop(signal.SIGTERM)
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def stop(self, number: int, frame=None) -> None:
        """Have all of them end, after saving."""
        self.stopped.append(number)
        for child in list(self.running):
            self.pass_on(child)

    def pass_on(self, child: subprocess.Popen) -> None:
        """Pass the last signal on, once: a second one would cut the saving."""
        with self.lock:
            new = self.running.get(child, len(self.stopped)) < len(self.stopped)
            if new:
                self.running[child] = len(self.stopped)
        if new:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGINT if self.stopped[-1] == signal.SIGINT else signal.SIGTERM)

    def follow(self, line: list[str], title: str = "", environment: dict[str, str] | None = None) -> int:
        """Run a command to its end; its exit status. With a title, which its lines then begin with, in any thread."""
        if self.stopped:
            return 128 + self.stopped[0]
        # In a session of its own: a second Ctrl-C, from the terminal, would cut its saving. And it ends with this
        # process, which may be killed before it can pass anything on.
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
        self.pass_on(child)  # of a signal that came while it was started
        try:
            for text in child.stdout or ():
                # In one piece, with the end that a last line may lack: others print too.
                print(f"[{title}] {text.rstrip()}\n", end="", flush=True)
        except BaseException:  # nobody hears it any more
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


def follow(line: list[str]) -> tuple[int, bool]:
    """Run a command to its end; its exit status, and whether a signal came, which is passed on for it to save."""
    with Children() as children:
        code = children.follow(line)
    return code, bool(children.stopped)


def shortened(cfg: Config, iters: int | None = None, epochs: int | None = None) -> dict[str, object]:
    """Options that give a run another length, at whose end it is validated; none where no length is given."""
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
    if cfg.model.type != "Pretraining":  # which validates nothing
        options["train_cfg.val_interval"] = length
    return options
