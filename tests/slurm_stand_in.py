#!/usr/bin/env python3
"""Stands in for Slurm: as `srun` it runs a step's tasks, as `scontrol` and `sbatch` it records, in the folder $OUT.

srun starts one process per task with Slurm's variables, and passes SIGUSR1 and SIGTERM on to every process of the step,
loader workers too (`SignalChildrenProcesses=yes` in cgroup.conf). When a task has failed it ends the step by SIGTERM
and, KILL_WAIT seconds later, SIGKILL. It exits with the largest status.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

OUT = Path(os.environ["OUT"])
KILL_WAIT = 30  #: s, Slurm's default


NAME = Path(sys.argv[0]).name


def step_of(pids):
    """The processes and all that they have started."""
    for pid in pids:
        yield pid
        try:
            tasks = list(Path(f"/proc/{pid}/task").iterdir())
            yield from step_of([int(p) for task in tasks for p in (task / "children").read_text().split()])
        except OSError:
            continue


def send(tasks, number):
    for pid in list(step_of([task.pid for task in tasks if task.poll() is None])):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def srun():
    words = sys.argv[1:]
    options = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word.split()[0])
    command = words[next(i for i, word in enumerate(words) if not word.startswith("--")) :]
    if "SRUN_STATUS" in os.environ:  # a step that has ended so
        return int(os.environ["SRUN_STATUS"])
    count = int(options["ntasks"])
    env = {**os.environ, "SLURM_NTASKS": str(count), "SLURM_NTASKS_PER_NODE": options["ntasks-per-node"]}
    env |= {"SLURM_JOB_NODELIST": "localhost"}
    tasks = [
        subprocess.Popen(command, env={**env, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)}, start_new_session=True)
        for n in range(count)
    ]
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda got, _: send(tasks, got))
    end = None
    while any(task.poll() is None for task in tasks):
        if end is None and any(task.poll() for task in tasks):  # --kill-on-bad-exit
            send(tasks, signal.SIGTERM)
            end = time.monotonic() + KILL_WAIT
        if end and time.monotonic() > end:
            send(tasks, signal.SIGKILL)
        time.sleep(0.05)
    return max(128 - task.returncode if task.returncode < 0 else task.returncode for task in tasks)


def scontrol():
    if sys.argv[1] == "show":
        print("localhost")
    return 0


def sbatch():
    script = sys.argv[sys.argv.index("--wrap") + 1]
    return subprocess.run(["sh", "-c", script], env={**os.environ, "SLURM_JOB_ID": "7"}).returncode


if __name__ == "__main__":
    with open(OUT / f"{NAME}.log", "a") as file:
        file.write(" ".join(sys.argv[1:]) + "\n")
    sys.exit({"srun": srun, "scontrol": scontrol, "sbatch": sbatch}[NAME]())
