"""Runs that tests attack: started for real, their processes found by what started them."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import CPU, ROOT
from test_pretraining import SCENES, flags, losses

from semaim.checkpoints.files import newest_checkpoint, read_checkpoint
from semaim.engine.saving import choose_checkpoint
from semaim.engine.training import train

LONG = {"train_cfg.max_epochs": 2000, "default_hooks.checkpoint.interval": 2000}  #: epochs of a run that an attack ends


def begin(cfg, *more, until="[2/5]", stdout=subprocess.PIPE, **keys):
    """tools/train.py of a config of `tiny_config`, when it has printed `until`."""
    line = [sys.executable, str(ROOT / "tools/train.py"), SCENES, *map(str, more), *flags(cfg)]
    keys["env"] = {**os.environ, **CPU, **keys.get("env", {})}
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True, **keys
    )
    for line in process.stdout:
        if until in line:
            return process
    raise AssertionError(process.communicate()[1])


def ended(process, seconds=120):
    """Exit status and lines of stderr of a run that ends by itself; none of them is a traceback's."""
    _, error = process.communicate(timeout=seconds)
    assert "Traceback" not in error and "Logging error" not in error, error
    return process.returncode, error.strip().splitlines()


def children(pid, word=""):
    """Process ids of the direct children whose command line holds a word."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            if word in Path(f"/proc/{child}/cmdline").read_text():
                found.append(int(child))
    return sorted(found)


def ranks(process):
    """Process ids of a run's ranks, in their order."""
    found = children(process.pid, "train.py")
    rank = {}
    for pid in found:
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"RANK="):
                rank[int(entry[5:])] = pid
    return [rank[number] for number in sorted(rank)]


def workers(pid, count=1):
    """Process ids of the loaders' workers of a process, when there are so many."""
    for _ in range(600):
        if len(found := children(pid, "train.py")) >= count:
            return found
        time.sleep(0.05)
    raise AssertionError("no workers")


def may_mount():
    """Whether a small file system can be mounted here, seen by the attacked run alone."""
    try:
        line = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/mnt"]
        return subprocess.run(line, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


mounts = pytest.mark.skipif(not may_mount(), reason="mounting needs root and unshare: runs where both are there")


def on_small_disk(folder, size, line, before="true"):
    """A command run where `folder` has only `size` kB."""
    shell = f"mount -t tmpfs -o size={size}k tmpfs {folder} && {before} && exec {shlex.join(map(str, line))}"
    env = {**os.environ, **CPU}
    return subprocess.run(["unshare", "-m", "sh", "-c", shell], env=env, cwd=ROOT, capture_output=True, text=True)


def goes_on(cfg, whole):
    """Assert that the interrupted run, continued in one process, is the whole one; its optimizer steps when saved."""
    assert Path(cfg.work_dir, "latest.pth").resolve().name == "interrupted.pth"
    step = read_checkpoint(newest_checkpoint(cfg.work_dir))["step"]
    assert step < whole.train_cfg.max_epochs * 5
    train(cfg, choose_checkpoint(cfg, "auto"))
    found, expected = losses(cfg), losses(whole)
    # Of the last iteration before it ended, a rank 0 that was killed has perhaps no line, and one that has lost another
    # its own loss, not the mean.
    assert [*range(1, step), *range(step + 1, len(expected) + 1)] == sorted(found.keys() - {step})
    worst = max(abs(loss - expected[iteration]) for iteration, loss in found.items() if iteration != step)
    assert worst < 1e-4, (step, worst)
    return step
