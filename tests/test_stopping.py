"""Runs that are stopped, killed, or cannot go on or save: nothing is lost, nothing is left behind."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT
from test_pretraining import SCENES, command, flags, losses  # noqa: F401

from semaim.checkpoints.files import CannotSave, newest_checkpoint, read_checkpoint, write_checkpoint
from semaim.data.folder import ResumableBatches, find_images
from semaim.engine.saving import choose_checkpoint
from semaim.engine.training import train
from semaim.errors import UserError

STUCK = """
from semaim.engine.runner import evaluation_loader

class Stuck:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        print("loading", flush=True)
        time.sleep(1000)

next(iter(evaluation_loader(Stuck(), 2, 1)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no parent-death signal here: runs on Linux")
def test_a_killed_run_leaves_no_worker_not_even_a_stuck_one():
    with subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout.readline() == "loading\n"
        process.kill()
        process.communicate(timeout=60)  # the pipe ends with the last who holds it


@pytest.mark.skipif(sys.platform != "linux", reason="no parent-death signal here: runs on Linux")
def test_a_killed_launcher_leaves_no_process(tiny_config):
    cfg = tiny_config(**{"train_cfg.max_epochs": 10000, "default_hooks.checkpoint.interval": 10000})
    line = [sys.executable, str(ROOT / "tools/train.py"), SCENES, "--gpus", "2", *flags(cfg)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as launcher:
        assert any("[2/5]" in line for line in launcher.stdout)
        launcher.kill()
        launcher.communicate(timeout=60)  # the pipe ends with the last who holds it


@pytest.mark.parametrize(
    ("number", "processes"),
    [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 2)],
)
@pytest.mark.slow
def test_a_stopped_run_saves_and_goes_on_inside_the_epoch(tiny_config, number, processes):
    if number == signal.SIGTERM and sys.platform != "linux":
        pytest.skip("no parent-death signal here, so workers stay in the process group: runs on Linux")
    # Rounding differs between one process and two, and a learned order may hang on it.
    order = "semantic" if processes == 1 else "raster"
    options = {"train_cfg.max_epochs": 40, "default_hooks.checkpoint.interval": 40, "model.network.order": order}
    whole, parts = tiny_config("whole", **options), tiny_config("parts", **options)
    train(whole)
    arguments = ["--gpus", str(processes), *flags(tiny_config("parts", **options, num_workers=1))]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools/train.py"), SCENES, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    assert any("[2/5]" in line for line in process.stdout)
    os.killpg(process.pid, number)  # as a terminal or a queue does it: to the whole group
    rest = process.stdout.read()
    assert process.wait(60) == 128 + number, rest
    assert rest.strip().splitlines()[-1] == "interrupted" and "Traceback" not in rest
    saved = read_checkpoint(newest_checkpoint(parts.work_dir))
    assert 2 <= saved["step"] < 200 and saved["epoch"] in (saved["step"] // 5, (saved["step"] - 1) // 5)
    train(parts, choose_checkpoint(parts, "auto"))
    assert losses(parts) == (losses(whole) if processes == 1 else pytest.approx(losses(whole), abs=1e-4))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.slow
def test_a_broken_image_is_named_and_nothing_is_lost(tiny_config, scenes, tmp_path, processes):
    shutil.copytree(scenes, tmp_path / "data")
    fourth_batch = list(ResumableBatches(40, 8))[3]
    victim = Path(find_images(tmp_path / "data")[fourth_batch[0][1]])
    victim.write_bytes(victim.read_bytes()[:200])
    cfg = tiny_config(**{"dataset.root": str(tmp_path / "data")})
    done = command(SCENES, processes, *flags(cfg), cwd=ROOT)
    assert done.returncode == 2
    assert f"error: cannot read image {victim}" in done.stderr
    assert "Traceback" not in done.stderr and "terminate called" not in done.stderr
    if processes == 1:
        saved = read_checkpoint(newest_checkpoint(cfg.work_dir))
        assert saved["step"] == 3
        victim.unlink()
        train(cfg, choose_checkpoint(cfg, "auto"))


def test_a_full_disk_ends_the_run_and_keeps_what_was_there(tiny_config):
    cfg = tiny_config(**{"default_hooks.checkpoint.interval": 2})
    train(cfg)
    before = (Path(cfg.work_dir) / "epoch_2.pth").read_bytes()
    longer = tiny_config(**{"train_cfg.max_epochs": 3})

    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails with EFBIG
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = command(SCENES, "1", "--resume", "--override", *flags(longer), cwd=ROOT, preexec_fn=small_files)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: cannot save") and "epoch_3.pth: no space left" in last and "--resume" in last
    assert {path.name for path in Path(cfg.work_dir).glob("*.pth")} == {"epoch_2.pth", "latest.pth"}
    assert not list(Path(cfg.work_dir).glob(".*partial"))
    assert (Path(cfg.work_dir) / "latest.pth").read_bytes() == before


@pytest.mark.parametrize("late", [False, True])
def test_a_diverged_run_stops_without_saving(tiny_config, late):
    interval = {"default_hooks.logger.interval": 1000}
    cfg = tiny_config(base_lr=1e30, **interval, **{"default_hooks.runtime_info.late": late})
    with pytest.raises(UserError, match="the loss is (nan|inf) in iteration [23]:.*lower --cfg-options base_lr"):
        train(cfg)
    assert newest_checkpoint(cfg.work_dir) is None


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    write_checkpoint({"format": "semaim", "n": 1}, tmp_path / "a.pth")

    def half(checkpoint, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(CannotSave, match="a.pth: no space left on the disk; earlier checkpoints are whole"):
        write_checkpoint({"format": "semaim", "n": 2}, tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth")["n"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_a_kill_while_saving_leaves_the_old_file_whole(tmp_path):
    write_checkpoint({"format": "semaim", "n": 1}, tmp_path / "a.pth")
    script = (
        "import sys, time, torch; from semaim.checkpoints.files import write_checkpoint\n"
        "save = torch.save\n"
        "def slow(checkpoint, file):\n"
        "    save(checkpoint, file); file.flush(); print('half', flush=True); time.sleep(60)\n"
        "torch.save = slow\n"
        "write_checkpoint({'format': 'semaim', 'n': 2}, sys.argv[1])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path / "a.pth"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "half\n"
    process.kill()
    process.wait(30)
    assert read_checkpoint(tmp_path / "a.pth")["n"] == 1
