"""Jobs on a cluster that Slurm stops: they save, queue again and go on; Slurm is played by tests/slurm_stand_in.py."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import CPU, ROOT
from test_pretraining import SCENES, flags, losses

from semaim.checkpoints.files import newest_checkpoint, read_checkpoint
from semaim.engine.training import train

SCRIPT = str(ROOT / "tools/slurm_train.sh")


@pytest.fixture
def slurm(tmp_path):
    """The environment of a job, and a function that returns what a command of Slurm's was called with."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name in ("srun", "scontrol", "sbatch"):
        shutil.copy(ROOT / "tests/slurm_stand_in.py", folder / name)
        (folder / name).chmod(0o755)
    (folder / "python3").symlink_to(sys.executable)
    env = {**os.environ, **CPU, "OUT": str(folder), "PATH": f"{folder}:{os.environ['PATH']}", "GPUS": "2"}
    env |= {"SLURM_JOB_ID": str(os.getpid())}

    def calls(name):
        log = folder / f"{name}.log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [line for line in lines if not line.startswith("show")]

    return env, calls


@pytest.mark.parametrize(("status", "requeued"), [(138, True), (143, False), (0, False), (3, False)])
def test_only_the_end_of_the_time_queues_a_job_again(slurm, status, requeued):
    env, calls = slurm
    env |= {"REQUEUE": "1", "SRUN_STATUS": str(status)}
    done = subprocess.run([SCRIPT, "p", "n", "config.py", "work"], env=env, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert calls("scontrol") == ([f"requeue {env['SLURM_JOB_ID']}"] if requeued else [])
    assert calls("srun")[-1].endswith("config.py --work-dir work --resume")
    # Without REQUEUE nothing is added, and nothing queues again.
    del env["REQUEUE"]
    done = subprocess.run([SCRIPT, "p", "n", "config.py", "work"], env=env, capture_output=True, text=True)
    assert done.returncode == status and len(calls("scontrol")) == requeued
    assert calls("srun")[-1].endswith("config.py --work-dir work")


def test_outside_of_a_job_requeue_submits_one(slurm):
    env, calls = slurm
    env |= {"REQUEUE": "1", "SRUN_STATUS": "138", "NOTICE": "60", "SRUN_ARGS": "--time=10 --qos=low"}
    del env["SLURM_JOB_ID"]
    line = [SCRIPT, "p", "n", "a config.py", "work", "--resume", "--pretrained", "a b.pth"]
    done = subprocess.run(line, env=env, capture_output=True, text=True)
    assert done.returncode == 138, done.stderr
    [asked] = calls("sbatch")
    assert asked.startswith("--partition=p --job-name=n --gres=gpu:2 --ntasks=2 --ntasks-per-node=2")
    assert "--requeue --open-mode=append --signal=USR1@60 --time=10 --qos=low" in asked
    assert calls("scontrol") == ["requeue 7"]
    assert calls("srun")[-1].endswith("a config.py --work-dir work --resume --pretrained a b.pth")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="no /proc here: runs on Linux")
def test_a_job_saves_before_its_end_and_goes_on(slurm, tiny_config):
    env, calls = slurm
    env |= {"REQUEUE": "1"}
    options = {"train_cfg.max_epochs": 60, "default_hooks.checkpoint.interval": 60, "model.network.order": "raster"}
    whole, parts = tiny_config("whole", **options), tiny_config("parts", **options, num_workers=1)
    train(whole)
    line = [SCRIPT, "p", "n", SCENES, parts.work_dir, *flags(parts)]
    job = subprocess.Popen(line, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert any("[2/5]" in row for row in job.stdout)
    job.send_signal(signal.SIGUSR1)  # --signal=B:USR1@120: to the batch script alone
    _, error = job.communicate(timeout=300)
    assert job.returncode == 138 and "Traceback" not in error, error
    assert error.count("SIGUSR1: stopping") == 1
    assert calls("scontrol") == [f"requeue {env['SLURM_JOB_ID']}"]
    saved = read_checkpoint(newest_checkpoint(parts.work_dir))
    assert Path(newest_checkpoint(parts.work_dir)).resolve().name == "interrupted.pth" and 2 <= saved["step"] < 300
    done = subprocess.run(line, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-4) and len(calls("scontrol")) == 1
