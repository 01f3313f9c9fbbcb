"""A process that has imported what every tool imports, and forks one for each: seconds sooner than a new interpreter.

It imports other projects' modules only. Of ours each tool imports its own, so that one it lacks is missed here too.
"""

import importlib
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy

PRELOADED = (
    "cv2", "matplotlib.pyplot", "mmengine.runner", "pycocotools.coco", "scipy.optimize", "timm.data", "timm.models",
    "torch.utils.tensorboard", "torchvision",
)  # fmt: skip


class Warm:
    """Runs Python scripts as `subprocess.run` would, in forks of a process of its own."""

    def __init__(self, **environment: str):
        self.environment = environment
        self.server = None

    def __call__(self, line: list[str], environment: dict[str, str], cwd: Path, timeout: float):
        """Run `line` (script, arguments); a `subprocess.CompletedProcess`."""
        if self.server is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.server = subprocess.Popen([sys.executable, __file__], **pipes, env={**os.environ, **self.environment})
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            files = [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in (out, err)]
            asked = {"line": line, "environment": environment, "cwd": str(cwd), "files": files, "timeout": timeout}
            self.server.stdin.write(json.dumps(asked) + "\n")
            self.server.stdin.flush()
            status = json.loads(self.server.stdout.readline())
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(line, status, out.read(), err.read())


def become(asked: dict) -> None:
    """In a fork: what `python SCRIPT ...` would be at its start, then the script."""
    signal.alarm(int(asked["timeout"]))  # ends it
    for number, path in enumerate([os.devnull, *asked["files"]]):
        os.dup2(os.open(path, os.O_RDWR), number)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    random.seed()  # a new interpreter draws other numbers each time
    numpy.random.seed()
    sys.argv = asked["line"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


def serve() -> None:
    """Fork a process for each line of standard input, one after another, and write its exit status."""
    for name in PRELOADED:
        with suppress(ImportError):  # an extra that is not installed here
            importlib.import_module(name)
    for row in sys.stdin:
        child = os.fork()
        if not child:
            return become(json.loads(row))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
