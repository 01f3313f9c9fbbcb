"""Attacks on the processes of runs, in full: killed at any moment, stopped, with a full shared memory or disk."""

import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from attacks import LONG, begin, children, ended, goes_on, mounts, on_small_disk, ranks, workers
from attempts import Attempt, alive
from commands import ROOT
from counts import record
from test_pretraining import SCENES, flags

from semaim.engine.training import train

linux = pytest.mark.skipif(sys.platform != "linux", reason="no /proc here: runs on Linux")


ATTACKS = 6  #: of each kind


@linux
@pytest.mark.faults
@pytest.mark.parametrize("kind", ["rank", "worker", "sigusr1"])
def test_killed_at_any_moment(tiny_config, kind):
    """What an interrupted run has saved is the state of the uninterrupted one: the losses after it are the same."""
    options = {"train_cfg.max_epochs": 60, "default_hooks.checkpoint.interval": 60, "model.network.order": "raster"}
    whole = tiny_config("whole", **options)
    train(whole)
    draw, counts = random.Random(0), dict.fromkeys(("named", "saved", "as_whole"), 0)
    for attack in range(ATTACKS):
        parts = tiny_config(f"parts{attack}", **options)
        processes = 1 if kind == "worker" else 2
        run = begin(tiny_config(f"parts{attack}", **options, num_workers=int(kind != "rank")), "--gpus", processes)
        members = ranks(run) if processes > 1 else [run.pid]
        victims = [draw.choice(members)]
        if kind == "worker":
            victims = workers(run.pid)
        elif kind == "sigusr1":  # to every process of the job
            victims = [run.pid, *members, *(worker for member in members for worker in workers(member))]
        time.sleep(draw.uniform(0, 3))
        for victim in victims:
            os.kill(victim, signal.SIGUSR1 if kind == "sigusr1" else signal.SIGKILL)
        status, lines = ended(run)
        said = {"worker": f"error: a data loader's worker (process {victims[0]}) ", "sigusr1": "interrupted"}
        if kind == "rank":
            said["rank"] = f"error: rank {members.index(victims[0])} (process {victims[0]}) "
        counts["named"] += status == (138 if kind == "sigusr1" else 137) and lines[-1].startswith(said[kind])
        if (Path(parts.work_dir) / "interrupted.pth").exists():
            counts["saved"] += 1
            goes_on(parts, whole)
            counts["as_whole"] += 1
    record(f"killed_{kind}", attacks=ATTACKS, **counts)
    assert counts == dict.fromkeys(counts, ATTACKS)


@linux
@pytest.mark.faults
def test_a_stopped_rank_is_named_and_ends_the_run_in_time(tiny_config):
    cfg = tiny_config(**LONG)
    run = begin(cfg, "--gpus", 2, "--timeout", 10)
    pid = ranks(run)[1]
    os.kill(pid, signal.SIGSTOP)
    status, lines = ended(run)
    assert status == 124 and not children(os.getpid(), SCENES)
    said = f"rank 1 (process {pid} on {socket.gethostname()}) has not reported for "
    assert any(line.startswith(said) and line.endswith("after 10 s (--timeout) the run ends") for line in lines)
    assert lines[-2].startswith(f"error: {said}") and "--timeout 10, so the run ends" in lines[-2]
    assert lines[-1] == f"nothing is saved in {cfg.work_dir}"


@mounts
@pytest.mark.faults
@pytest.mark.parametrize(("size", "saved"), [(4, False), (100, True)])
def test_a_shared_memory_that_is_full(tiny_config, size, saved):
    """4 kB do not hold the workers' locks, 100 kB no second batch."""
    cfg = tiny_config(**LONG, num_workers=1)
    done = on_small_disk("/dev/shm", size, [sys.executable, ROOT / "tools/train.py", SCENES, *flags(cfg)])
    assert done.returncode in (2, 135), done.stderr
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and "shared memory (/dev/shm)" in line and "--shm-size" in line
    assert (Path(cfg.work_dir) / "interrupted.pth").exists() == saved


@mounts
@pytest.mark.faults
def test_a_disk_without_space_at_the_start(tiny_config):
    cfg = tiny_config()
    Path(cfg.work_dir).mkdir()
    done = on_small_disk(cfg.work_dir, 4, [sys.executable, ROOT / "tools/train.py", SCENES, *flags(cfg)])
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert last == f"error: cannot write to the work folder {cfg.work_dir}: No space left on device"


@linux
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_no_process_of_a_killed_command_with_a_pool_stays(method, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import time\n"
        "from semaim.data.pools import process_pool\n"
        "if __name__ == '__main__':\n"
        f"    with process_pool(3, {method!r}, int, '1') as pool:\n"
        "        list(pool.map(time.sleep, [0.1] * 30))\n"
        "        print('all done', flush=True)\n"
        "        time.sleep(600)\n"
    )
    run = Attempt([sys.executable, str(script)], tmp_path, tmp_path / "tmp")
    assert run.until(lambda it: "all done\n" in it.rows, 0), run.tail()
    assert len(alive(run.mark)) >= 4
    run.kill("tool", random.Random(0))
    assert run.wait() == -signal.SIGKILL and not run.left
