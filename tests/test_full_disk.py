"""A full or read-only disk: logs are given up in one line, and the state goes to --rescue-dir."""

import logging
import os
import sys
import threading
from pathlib import Path

import pytest
import torch
from attacks import LONG, mounts, on_small_disk
from commands import ROOT
from mmengine.config import Config
from mmengine.visualization import LocalVisBackend
from test_pretraining import SCENES, flags, losses

from semaim.checkpoints.files import CannotSave, read_checkpoint
from semaim.engine import results
from semaim.engine.config import load_config
from semaim.engine.full_disk import Tolerant, go_on, write_or_rescue
from semaim.engine.saving import choose_checkpoint
from semaim.engine.training import train
from semaim.errors import UserError, run


def test_the_state_is_rescued_and_the_run_goes_on_from_it(tiny_config, tmp_path):
    whole, parts = tiny_config("whole"), tiny_config("parts")
    train(whole)
    (tmp_path / "parts/epoch_1.pth/no file").mkdir(parents=True)  # so it cannot be written
    with pytest.raises(CannotSave) as stopped:
        train(parts, rescue_dir=str(tmp_path / "rescue"))
    rescued = tmp_path / "rescue/parts_epoch_1.pth"
    assert str(stopped.value).startswith(f"cannot save {tmp_path}/parts/epoch_1.pth: ")
    assert f"; the run's state is in {rescued}: continue with --resume {rescued} when there" in str(stopped.value)
    other = tiny_config("other")
    train(other, choose_checkpoint(other, str(rescued)))
    assert losses(other) == {i: loss for i, loss in losses(whole).items() if i > 5}
    ours, theirs = (read_checkpoint(Path(cfg.work_dir) / "epoch_2.pth")["model"] for cfg in (other, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_rescued_state_replaces_none_of_another_run(tmp_path):
    for name, value in (("a", 1), ("a", 2), ("b", 3)):
        state = {"format": "semaim", "saving": {"run": name * 32}, "value": value}
        with pytest.raises(CannotSave, match="the run's state is in"):
            write_or_rescue(state, tmp_path / name / "run" / "epoch_1.pth", tmp_path / "rescue")
    held = {path.name: read_checkpoint(path)["value"] for path in (tmp_path / "rescue").iterdir()}
    assert held == {"run_epoch_1.pth": 2, "run_epoch_1_bbbbbbbb.pth": 3}


def test_without_a_place_to_rescue_to_nothing_is_claimed(tiny_config, tmp_path):
    for name in ("run", "other"):
        (tmp_path / name / "epoch_1.pth/no file").mkdir(parents=True)
    with pytest.raises(CannotSave, match="epoch_1.pth: .*; earlier checkpoints are whole") as error:
        train(tiny_config())
    assert "state is in" not in str(error.value)
    (tmp_path / "file").touch()
    with pytest.raises(CannotSave, match="cannot save .*file/other_epoch_1.pth: .*File exists"):
        train(tiny_config("other"), rescue_dir=str(tmp_path / "file"))


def test_the_rescue_folder_is_checked_before_the_run(tiny_config, tmp_path, here):
    (tmp_path / "file").touch()
    done = here("train.py", SCENES, "--rescue-dir", tmp_path / "file", *flags(tiny_config()))
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"error: cannot write to the rescue folder {tmp_path}/file: it is a file; name another"
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here: runs on Linux")
def test_a_log_that_cannot_be_written_is_one_line(tmp_path, capfd):
    logger = logging.Logger("full")
    logger.addHandler(logging.FileHandler("/dev/full"))
    logger.addHandler(logging.FileHandler(tmp_path / "log"))
    for number in range(3):
        go_on(logger) if number == 0 else None
        logger.info(f"line {number}")
    assert capfd.readouterr().err == (
        "warning: cannot write /dev/full: no space left, or the folder cannot be written; the run goes on without it\n"
    )
    assert (tmp_path / "log").read_text() == "line 0\nline 1\nline 2\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here: runs on Linux")
def test_scalars_that_cannot_be_written_are_one_line(tmp_path, capfd):
    (tmp_path / "scalars.json").symlink_to("/dev/full")
    writer = Tolerant(LocalVisBackend(str(tmp_path)))
    writer.add_scalars({"loss": 1.0}, 1)
    writer.add_scalars({"loss": 0.5}, 2)
    writer.add_config(Config({"a": 1}))
    expected = (
        f"warning: cannot write LocalVisBackend in {tmp_path}: No space left on device; the run goes on without it\n"
    )
    assert capfd.readouterr().err == expected and (tmp_path / "config.py").exists()
    with pytest.raises(AssertionError):
        writer.add_scalars([1], 3)  # only a disk's errors are tolerated

    def fails(error):
        thread = threading.Thread(target=lambda: (_ for _ in ()).throw(error))
        thread.start()
        thread.join()
        return capfd.readouterr().err

    assert "OSError" in fails(OSError(28, "No space left"))  # of any other thread


def test_an_error_of_the_disk_without_a_name_is_one_line(capfd):
    def full():
        raise OSError(28, "No space left on device")

    def other():
        raise OSError(5, "Input/output error")

    out = os.dup(1)
    try:
        assert run(full) == 2
    finally:
        os.dup2(out, 1)
    assert capfd.readouterr().err == "error: a file, or the output: No space left on device\n"
    with pytest.raises(OSError, match="Input/output"):
        run(other)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here: runs on Linux")
def test_results_that_cannot_be_written_are_one_line(tmp_path, monkeypatch):
    class Record:
        def write(self, folder):
            with open("/dev/full", "w") as file:
                file.write("x")

    monkeypatch.setattr(results, "record_of", lambda values: Record())
    cfg = load_config(ROOT / "semaim/configs/knn/vit_tiny_scenes.py")
    cfg.work_dir = str(tmp_path)
    with pytest.raises(UserError, match="cannot write .*results.json: No space left on device; the figures are in"):
        results.write_results(cfg, {}, 1, 1, None)


@mounts
@pytest.mark.slow
def test_a_disk_that_fills_up(tiny_config, tmp_path):
    cfg = tiny_config(**LONG | {"train_cfg.max_epochs": 100, "default_hooks.checkpoint.interval": 100})
    Path(cfg.work_dir).mkdir()
    line = [sys.executable, ROOT / "tools/train.py", SCENES, "--rescue-dir", tmp_path / "rescue", *flags(cfg)]
    done = on_small_disk(cfg.work_dir, 100, line)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert "Traceback" not in done.stderr and "Logging error" not in done.stderr, done.stderr
    assert len(lines) == 4 and sorted(line[:8] for line in lines) == ["error: c", *["warning:"] * 3]
    assert lines[-1].startswith("error: cannot save") and f"--resume {tmp_path}/rescue/run_epoch_100.pth" in lines[-1]
    assert read_checkpoint(tmp_path / "rescue/run_epoch_100.pth")["step"] == 500
