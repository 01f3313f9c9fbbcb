"""The command-line tools, run for real, and what their runs leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

from warm import Warm

from semaim.registry import task_of
from semaim.results.logs import read_scalars

ROOT = Path(__file__).resolve().parent.parent

#: Why a test that builds a wheel is skipped.
OLD_SETUPTOOLS = "setuptools is older than 77.0.3: runs after tools/setup.sh"
CPU = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
fork = Warm(**CPU)


def tool(name, *arguments, **environment):
    """A tool's whole run, on the CPU."""
    line = [str(ROOT / "tools" / name), *map(str, arguments)]
    env = {**os.environ, **CPU, **environment}
    if name.endswith(".py") and not environment and sys.platform == "linux":
        return fork(line, env, ROOT, timeout=1800)
    if name.endswith(".py"):
        line.insert(0, sys.executable)
    return subprocess.run(line, capture_output=True, text=True, timeout=1800, env=env, cwd=ROOT)


def one_line(done, message):
    """A failure as users see it."""
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def flags(changed):
    """Changes of a config as --cfg-options."""
    return ["--cfg-options", *(f"{key}={value}" for key, value in changed.items())]


def results(folder):
    """What a run measured, and on what."""
    return json.loads((Path(folder) / "results.json").read_text())


def losses(folder):
    """step -> training loss, all digits."""
    return {line["iter"]: line["loss"] for line in read_scalars(folder) if "iter" in line and "loss" in line}


def check_data(cfg, splits):
    """The images of these splits, checked as before a training."""
    return task_of(cfg).data(cfg, splits)[0]


def describe_data(cfg, sets):
    """What the labels of these data sets hold."""
    return task_of(cfg).describe_data(cfg, sets)
