"""The one command says what is wrong before anything starts, and where it stopped."""

import signal

import pytest
from test_reproduce import QUICK, commands, here, refused  # noqa: F401

from semaim.results.running import Children


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "study"], "--cifar DIR"),
        (["--scale", "study", "--cifar", "/nowhere"], "--cifar /nowhere: no such folder"),
        (["--scale", "quick", "--imagenet", "."], "--imagenet is not for scale quick, which takes --scenes"),
        (["--scale", "quick", "--length", "knn=3"], "--length knn: no length of scale quick"),
        (["--scale", "quick", "--length", "pretrain=0"], "--length pretrain=0: give 1 or more"),
        (["--scale", "quick", "--length", "pretrain=x"], "--length pretrain=x: write STAGE=N"),
        (["--scale", "quick", "--length", "pretrain"], "--length pretrain: write STAGE=N"),
        (["--scale", "paper", "--dry-run", "--length", "size=5"], "--length size: no length of scale paper"),
        (["--scale", "quick", "--rate", "pretrain"], "--rate pretrain: write STAGE=N"),
        (["--scale", "quick", "--rate", "pretrained=5"], "did you mean pretrain?"),
        (["--scale", "quick", "--rate", "moe/pretrain=5"], "did you mean mae?"),
        (["--scale", "quick", "--rate", "pretrain=0"], "give a number above 0"),
        (["--scale", "quick", "--nodes", "2"], "several nodes: print the commands with --dry-run"),
        (["--scale", "quick", "--nodes", "0"], "--nodes 0: give 1 or more"),
        (["--scale", "quick", "--jobs", "0"], "--jobs 0: give 1 or more"),
        (["--scale", "quick", "--gpus", "x"], "'x' GPUs requested"),
        (["--scale", "quick", "--only", "knn", "--skip", "knn"], "no stage is left"),
        (["--scale", "quick", "--only", "knn"], "semaim/seed0/knn needs"),
    ],
)
def test_errors(arguments, message, tmp_path, here):
    refused(here("--work-dir", tmp_path / "work", *arguments), message)
    assert not (tmp_path / "work").exists()


def test_runs_of_other_origin_are_left_alone(tmp_path, here):
    (tmp_path / "semaim/seed0/knn").mkdir(parents=True)
    (tmp_path / "semaim/seed0/knn/results.json").write_text('{"metrics": {}}')
    refused(here(*QUICK, "--work-dir", tmp_path), "semaim/seed0/knn holds a run of another command")


def test_a_failed_stage_stops_with_its_status(tmp_path, here):
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes/notes.txt").write_text("not mine")
    status, output, error = here(*QUICK, "--work-dir", tmp_path)
    assert status == 2 and len(commands(output)) == 1
    assert error.strip().splitlines()[-1] == "scenes failed with exit status 2; what has finished stays"


def test_an_interrupt_and_a_failure_say_where(tmp_path, here, monkeypatch):
    monkeypatch.setattr(Children, "follow", lambda self, line, *more: self.stop(signal.SIGINT) or 130)
    status, output, error = here(*QUICK, "--work-dir", tmp_path)
    assert status == 130 and len(commands(output)) == 1
    assert error == "interrupted in scenes: the same command continues from there\n"
    monkeypatch.setattr(Children, "follow", lambda self, line, *more: 0)  # and leaves nothing behind
    assert here(*QUICK, "--work-dir", tmp_path)[0] == 1
