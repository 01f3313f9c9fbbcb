"""What a run keeps in its work folder: never another's files, never a state that is lost, one run at a time."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import ROOT, one_line, tool
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from test_pretraining import SCENES

from semaim import reading
from semaim.checkpoints.files import read_checkpoint, write_checkpoint
from semaim.data.identity import identity_of
from semaim.engine.locking import work_folder
from semaim.engine.saving import Saving, choose_checkpoint, norm_of
from semaim.engine.training import train
from semaim.errors import Diverged, UserError

EPOCHS = {"train_cfg.max_epochs": 4, "default_hooks.checkpoint.keep": 2}


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory):
    """A finished run of four epochs that keeps two checkpoints, and its command line."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    options = {
        **{"model.network.img_size": 32, "model.network.embed_dim": 32, "model.network.num_heads": 2},
        **{"model.network.depth": 1, "total_batch_size": 8, "base_lr": 0.032, "num_workers": 0},
        **{"train_cfg.max_epochs": 4, "param_scheduler.warmup": 0.5, "default_hooks.pictures.interval": 0},
        **{"default_hooks.checkpoint.interval": 1, "default_hooks.checkpoint.keep": 2},
    }
    line = [SCENES, "--data-root", scenes, "--cfg-options", *(f"{key}={value}" for key, value in options.items())]
    done = tool("train.py", *line, "--work-dir", folder)
    assert done.returncode == 0, done.stderr
    return folder, line


def copied(finished, tmp_path):
    """A copy of the finished run's folder."""
    shutil.copytree(finished[0], tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def checkpoints(folder):
    """Names of the checkpoints in a folder."""
    return {path.name for path in Path(folder).glob("*.pth")}


def test_a_run_that_resumes_from_an_older_checkpoint_deletes_none_that_it_has_not_written(finished, tmp_path):
    run = copied(finished, tmp_path)
    assert checkpoints(run) == {"epoch_3.pth", "epoch_4.pth", "latest.pth"}
    # Of the user: copies under names of his own, and one that looks as if it were the run's first.
    for name in ("epoch_3_good.pth", "epoch_best.pth", "epoch_1.pth"):
        shutil.copy(run / "epoch_3.pth", run / name)
    done = tool("train.py", SCENES, "--work-dir", run, "--resume", run / "epoch_1.pth")
    assert done.returncode == 0, done.stderr
    theirs = {"epoch_3_good.pth", "epoch_best.pth", "epoch_1.pth"}
    assert checkpoints(run) == theirs | {"epoch_3.pth", "epoch_4.pth", "latest.pth"}
    assert os.readlink(run / "latest.pth") == "epoch_4.pth"
    ours, theirs = read_checkpoint(run / "epoch_4.pth")["model"], torch.load(finished[0] / "epoch_4.pth")["model"]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_result_stays_while_a_run_that_began_before_it_is_under_way(tiny_config):
    cfg = tiny_config(**EPOCHS | {"train_cfg.max_epochs": 3})
    train(cfg)
    run = Path(cfg.work_dir)
    (run / "epoch_1.pth").write_bytes(b"")  # deleted in its turn; this one is the user's
    longer = tiny_config(**EPOCHS)
    shutil.copy(run / "epoch_2.pth", run / "backup.pth")
    result = read_checkpoint(run / "epoch_3.pth")["model"]

    class Stop(Exception):
        """In place of a kill."""

    def killed(self, index, batch):
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("semaim.engine.runner.Resumable.run_iter", killed)
        with pytest.raises(Stop):
            train(longer, str(run / "backup.pth"))
    assert all(torch.equal(read_checkpoint(run / "epoch_3.pth")["model"][name], result[name]) for name in result)


def test_a_link_to_a_lost_checkpoint_is_an_error_that_names_another(finished, tmp_path):
    run = copied(finished, tmp_path)
    (run / "epoch_4.pth").unlink()
    done = tool("train.py", *finished[1], "--work-dir", run, "--resume")
    one_line(done, "latest.pth names epoch_4.pth, which is not there: name the checkpoint to continue from")
    assert f"--resume {run / 'epoch_3.pth'}" in done.stderr
    (run / "latest.pth").unlink()
    for resume in (["--resume"], []):  # nor does it start anew among another run's checkpoints
        one_line(tool("train.py", *finished[1], "--work-dir", run, *resume), f"{run} has no latest.pth")
    (run / "epoch_3.pth").unlink()
    (run / "latest.pth").symlink_to("epoch_4.pth")
    one_line(tool("train.py", *finished[1], "--work-dir", run, "--resume"), "and no other checkpoint")


def test_another_runs_checkpoint_does_not_continue_in_this_folder(finished, tiny_config):
    cfg = tiny_config()
    train(cfg)
    with pytest.raises(UserError, match="holds another run than .*epoch_3.pth: choose another --work-dir"):
        choose_checkpoint(cfg, str(finished[0] / "epoch_3.pth"))


def test_a_damaged_latest_checkpoint_is_no_obstacle_to_an_earlier_one(finished, tmp_path):
    run = copied(finished, tmp_path)
    for damage in (lambda path: os.truncate(path, path.stat().st_size // 2), lambda path: os.truncate(path, 0)):
        damage(run / "epoch_4.pth")
        done = tool("train.py", *finished[1], "--work-dir", run, "--resume")
        one_line(done, f"continue from an earlier one with --resume {run / 'epoch_3.pth'}")
    done = tool("train.py", *finished[1], "--work-dir", run, "--resume", run / "epoch_3.pth")
    assert done.returncode == 0, done.stderr
    assert checkpoints(run) == {"epoch_3.pth", "epoch_4.pth", "latest.pth"}


def test_another_runs_checkpoint_does_not_overwrite_those_whose_link_is_lost(finished, tiny_config, tmp_path):
    run = copied(finished, tmp_path)
    (run / "latest.pth").unlink()
    cfg = tiny_config("other")
    train(cfg)
    other = Path(cfg.work_dir) / "epoch_1.pth"
    cfg.work_dir = str(run)
    with pytest.raises(UserError, match="holds another run than .*epoch_1.pth: choose another --work-dir"):
        choose_checkpoint(cfg, str(other))


def test_only_the_checkpoint_that_a_run_resumes_from_is_kept_in_memory(finished, monkeypatch):
    kept = {}
    monkeypatch.setattr(reading, "_kept", kept)
    with reading.read_once():
        choose_checkpoint(Config({"work_dir": str(finished[0])}), str(finished[0] / "epoch_3.pth"))
        assert [Path(key[1]).name for key in kept] == ["epoch_3.pth"]


def test_a_second_run_in_a_folder_is_refused_and_a_killed_one_leaves_no_lock(finished, tmp_path):
    run = tmp_path / "run"
    endless = [*finished[1], "train_cfg.max_epochs=100000", "--work-dir", run]
    first = subprocess.Popen(
        [sys.executable, ROOT / "tools/train.py", *endless],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
    )  # fmt: skip
    with first:
        try:
            assert any("saved" in line for line in first.stdout)
            (run / ".epoch_99999.pth.123.partial").write_bytes(b"half")
            for command in (["train.py", *endless], ["train.py", *endless, "--resume"], ["test.py", *probe(run)]):
                done = tool(*command)
                one_line(done, f"{run} is in use by process {first.pid} on ")
                assert "choose another --work-dir" in done.stderr
            assert (run / ".epoch_99999.pth.123.partial").exists()
        finally:
            first.kill()
    assert (run / ".lock").exists()
    done = tool(
        "train.py", *finished[1], "--work-dir", run, "--resume", "--override", "--cfg-options", "train_cfg.max_epochs=1"
    )
    assert "in use" not in done.stderr
    assert not [path.name for path in run.iterdir() if path.name.endswith((".partial", ".lock"))]


def probe(run):
    """A measurement of a run's checkpoint into the same folder."""
    return ["semaim/configs/knn/vit_tiny_scenes.py", run / "latest.pth", "--work-dir", run]


def test_a_sweep_and_the_pipeline_hold_their_folder_too(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        assert other.stdout.readline() == "held\n"
        sweep = ["--lr", "0.1", "--work-dir", tmp_path]
        one_line(
            tool("sweep.py", "semaim/configs/finetune/vit_tiny_scenes.py", *sweep), f"{tmp_path} is in use by process"
        )
        done = tool("reproduce.py", "--scale", "quick", "--work-dir", tmp_path)
        one_line(done, f"{tmp_path} is in use by process {other.pid}")
        other.kill()


HOLD = """
import sys, time
from semaim.engine.locking import work_folder
with work_folder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_folder_is_in_use_until_the_last_process_of_a_killed_launch_has_ended(tmp_path):
    with subprocess.Popen([sys.executable, "-c", LAUNCH, tmp_path], stdout=subprocess.PIPE, text=True, cwd=ROOT) as run:
        child = int(run.stdout.readline())
        run.send_signal(signal.SIGKILL)
        run.wait()
        try:
            with pytest.raises(UserError, match="is in use by process"), work_folder(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)
    for _ in range(100):
        with contextlib.suppress(UserError), work_folder(tmp_path):
            break
        time.sleep(0.05)
    else:
        raise AssertionError("still in use")


LAUNCH = """
import os, subprocess, sys, time
from semaim.engine.launcher import SPAWNED
from semaim.engine.locking import work_folder
with work_folder(sys.argv[1]):
    if SPAWNED in os.environ:
        print(os.getpid(), flush=True)
        time.sleep(100)
    code = "import sys; exec(sys.argv.pop())"
    subprocess.run([sys.executable, "-c", code, sys.argv[1], CODE], env={**os.environ, SPAWNED: str(os.getpid())})
"""
LAUNCH = f"CODE = {LAUNCH!r}\n{LAUNCH}"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EIO, errno.ESTALE])
def test_a_file_system_without_locks_is_not_a_folder_in_use(tmp_path, monkeypatch, capsys, number):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.lockf", refuse)
    with work_folder(tmp_path):
        assert "on a file system without locks" in capsys.readouterr().err


def test_only_the_first_process_of_a_launch_holds_the_folder(tmp_path, monkeypatch):
    for name in ("RANK", "NODE_RANK"):
        monkeypatch.setenv(name, "1")
        with work_folder(tmp_path / "run"):
            assert not (tmp_path / "run").exists()
        monkeypatch.setenv(name, "0")
        with work_folder(tmp_path / "run"):
            assert json.loads((tmp_path / "run" / ".lock").read_text())["pid"] == os.getpid()
        assert not (tmp_path / "run").exists()


def test_changed_data_are_noticed_when_a_run_resumes(finished, scenes, tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(scenes, data)
    line = [*finished[1], "--work-dir", run]
    line[line.index("--data-root") + 1] = data
    assert tool("train.py", *line).returncode == 0
    (run / "latest.pth").unlink()
    (run / "latest.pth").symlink_to("epoch_3.pth")
    again = [SCENES, "--work-dir", run, "--resume"]
    done = tool("train.py", *again, "--strict-data")
    assert done.returncode == 0 and "have changed" not in done.stdout, done.stderr
    picture = next(data.rglob("*.jpg"))
    picture.write_bytes(picture.read_bytes() + b"\0")  # as many images, of the same names
    one_line(tool("train.py", *again, "--strict-data"), "--strict-data: the data (train) have changed since")
    done = tool("train.py", *again)
    assert done.returncode == 0 and "the data (train) have changed since" in done.stdout
    one_line(tool("train.py", *line, "--strict-data"), "--strict-data is for --resume")


def test_data_are_the_same_wherever_they_lie_and_others_if_a_name_or_a_size_is(tmp_path):
    def made(root, names):
        paths = [root / name for name in names]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x" * len(path.name))
        return identity_of(map(str, paths), root)

    names = [f"{place % 7}/{place:05}.jpg" for place in range(10_000)]
    first = made(tmp_path / "a", names)
    assert (
        made(tmp_path / "b", names) == first == identity_of([str(tmp_path / "a" / n) for n in names], f"{tmp_path}/a/")
    )
    assert len({first, made(tmp_path / "c", names[:-1]), made(tmp_path / "d", [*names[:-1], "6/10000.jpg"])}) == 3
    (tmp_path / "b" / names[5000]).write_bytes(b"longer than before")
    assert identity_of([str(tmp_path / "b" / name) for name in names], tmp_path / "b") != first
    in_shards = [f"{tmp_path}/a/x.tar?512+{size}=cat.jpg" for size in (10, 11)]
    assert identity_of(in_shards[:1], tmp_path / "a") != identity_of(in_shards[1:], tmp_path / "a")


@pytest.mark.parametrize("base_lr", [1e10, 1e36])
def test_exploded_weights_are_not_saved_over_good_ones(tiny_config, base_lr):
    cfg = tiny_config()
    train(cfg)
    good = (Path(cfg.work_dir) / "epoch_2.pth").read_bytes()
    longer = tiny_config(base_lr=base_lr, **{"train_cfg.max_epochs": 3})
    with pytest.raises(Diverged) as raised:
        train(longer, str(Path(cfg.work_dir) / "epoch_2.pth"))
    advice = f"continue from the last good checkpoint with --resume {cfg.work_dir}/epoch_2.pth --override and a lower"
    assert "the run diverged" in str(raised.value) and advice in str(raised.value)
    assert checkpoints(cfg.work_dir) == {"epoch_1.pth", "epoch_2.pth", "latest.pth"}
    assert (Path(cfg.work_dir) / "latest.pth").read_bytes() == good


def a_state(scale=1.0, moment=1.0):
    """What `judge` reads of a state."""
    moments = {0: {"exp_avg": torch.full((2,), moment), "step": torch.tensor(3)}}
    return {
        "model": {"weight": torch.tensor([3.0, 4.0]) * scale, "mean": torch.tensor(1e9)},
        "optimizer": {"state": moments},
    }


def losses_of(*values):
    """A run's losses so far."""
    return HistoryBuffer(list(values), [1] * len(values))


def test_a_state_that_is_worse_is_saved_but_the_last_good_one_is_kept_and_named():
    saving = Saving("run")
    assert saving.judge(a_state(), ["weight"], losses_of(2.0), "epoch_1.pth") == "" and saving.norm == 5
    assert saving.judge(a_state(), ["weight"], losses_of(1.0), "epoch_2.pth") == "" and saving.loss == 1
    found = saving.judge(a_state(), ["weight"], losses_of(2.5), "epoch_3.pth")
    assert "the mean loss is 2.5, and was 1 before; epoch_2.pth is kept" in found and saving.good == "epoch_2.pth"
    assert saving.judge(a_state(), ["weight"], losses_of(1.9), "epoch_4.pth") == "" and saving.good == "epoch_4.pth"
    assert saving.judge(a_state(99), ["weight"], losses_of(1.9), "epoch_5.pth") == ""
    for state, message in (
        (a_state(101), "the norm of the weights is 505, and was 5 at the start: the run diverged, and epoch_6.pth"),
        (a_state(float("nan")), "the model holds infinite numbers or NaN"),
        (a_state(moment=float("inf")), "the optimizer holds infinite numbers or NaN"),
    ):
        with pytest.raises(Diverged, match=message):
            saving.judge(state, ["weight"], losses_of(1.9), "epoch_6.pth")
    assert saving.good == "epoch_5.pth"
    masked = a_state()
    masked["model"]["mask"] = torch.full((2, 2), -torch.inf).triu(1)
    assert saving.judge(masked, ["weight"], losses_of(1.9), "epoch_6.pth") == ""
    masked["model"]["mean"] = torch.tensor(torch.nan)
    with pytest.raises(Diverged, match="the model holds infinite numbers or NaN"):
        saving.judge(masked, ["weight"], losses_of(1.9), "epoch_7.pth")
    assert norm_of([torch.tensor([3.0]), torch.tensor([4], dtype=torch.bfloat16), torch.tensor(7), None]) == 5


def test_a_worse_state_is_named_in_the_log_unless_the_loss_may_have_another_scale(finished, tmp_path):
    run = tmp_path / "run"
    whole = torch.load(finished[0] / "epoch_3.pth")
    write_checkpoint(whole | {"saving": whole["saving"] | {"loss": 1e-6}}, run / "epoch_3.pth")
    again = [SCENES, "--data-root", finished[1][2], "--work-dir", run, "--resume", run / "epoch_3.pth"]
    done = tool("train.py", *again, "--override", "--cfg-options", "base_lr=0.016")
    assert done.returncode == 0 and "epoch_4.pth: the mean loss is" not in done.stdout, done.stderr
    done = tool("train.py", *again)
    assert done.returncode == 0 and "epoch_4.pth: the mean loss is" in done.stdout, done.stderr
    assert "and was 1e-06 before; epoch_3.pth is kept" in done.stdout


def test_a_checkpoints_record_of_files_to_delete_names_no_others(finished, tmp_path):
    whole = torch.load(finished[0] / "epoch_3.pth")
    for change in ({"written": {"../../photos.pth": 0}}, {"written": "epoch_1.pth"}, {"run": 3}, {"more": 1}):
        write_checkpoint(whole | {"saving": whole["saving"] | change}, tmp_path / "odd.pth")
        done = tool("train.py", SCENES, "--work-dir", tmp_path / "run", "--resume", tmp_path / "odd.pth")
        one_line(done, "odd.pth: the record of what its run has saved is damaged")
