"""Processes of a run that are killed, stopped or lost: one line says which and why, and what is whole is saved."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from attacks import LONG, begin, ended, goes_on, ranks, workers
from commands import CPU, ROOT, one_line, tool
from test_pretraining import SCENES, flags

from semaim.checkpoints.files import read_checkpoint
from semaim.engine import stopping, watching
from semaim.engine.extraction import extract_features
from semaim.engine.features import knn_hits, probe_batches
from semaim.engine.launcher import SPAWNED, cannot_meet, continues, failed, join, run_command
from semaim.engine.logistic import fit_logistic
from semaim.engine.stopping import has_running_statistics
from semaim.engine.training import train
from semaim.engine.watching import Heard, Watch, ended_by, explained
from semaim.errors import Stopped, UserError

linux = pytest.mark.skipif(sys.platform != "linux", reason="no /proc here: runs on Linux")


# Who is waited for.


def watch_of(rank, world, timeout=100.0):
    """A watch without threads, at time 0."""
    it = object.__new__(Watch)
    it.rank, it.world, it.timeout = rank, world, timeout
    peers = range(world) if rank == 0 else (0,)
    it.heard = {peer: Heard((1, 1, 5, "iteration 3", f"process {peer}"), 0.0, 0.0) for peer in peers}
    return it


def test_the_one_with_the_smallest_position_is_waited_for():
    it = watch_of(0, 3)
    for heard in it.heard.values():
        heard.beat_at = 60.0  # all live
    it.heard[1].report = (9, 9, 4, "loading the batch of iteration 3", "process 1")
    it.heard[1].moved_at = 20.0
    seconds, text = it.waiting(60.0)
    assert seconds == 40 and "rank 1 (process 1) in loading the batch of iteration 3; the others wait for it" in text
    assert "rank 0" not in text
    # It saves, or measures alone: progress that the others do not have.
    it.heard[1].moved_at = 58.0
    assert it.waiting(60.0)[0] == 2
    # All in the same place: nobody is blamed.
    it.heard[1].report, it.heard[1].moved_at = it.heard[0].report, 0.0
    seconds, text = it.waiting(60.0)
    assert seconds == 60 and "rank 0" in text and "rank 2" in text and "wait for it" not in text


def test_a_silent_process_is_named_before_one_without_progress():
    it = watch_of(0, 2)
    it.heard[0].beat_at = 50.0
    seconds, text = it.waiting(50.0)
    assert seconds == 50 and text.startswith("rank 1 (process 1) has not reported for 50 s")
    other = watch_of(1, 2)
    assert other.waiting(5.0) == (0, "")  # rank 0 lives, and judges
    assert other.waiting(40.0)[1].startswith("rank 0 (process 0) has not reported for 40 s")


def test_reports_go_through_the_store(monkeypatch):
    store = torch.distributed.TCPStore("localhost", 0, 2, True, wait_for_workers=False)
    first, second = Watch(store, 0, 2, 2.0), Watch(store, 1, 2, 1e9)
    second.period = 0.01
    monkeypatch.setattr(watching, "_watch", first)
    try:
        watching.progress("iteration 7", 13)
        store.set("semaim/at/1", '[1, 4, 12, "loading", "process 5"]')
        for _ in range(1000):
            if first.heard[1].report[2] == 12 and first.heard[0].report[2:4] == (13, "iteration 7"):
                break
            time.sleep(0.01)
        else:
            raise AssertionError(first.heard)
        assert first.heard[1].report[1:] == (4, 12, "loading", "process 5")
    finally:
        first.closed.set()
        second.closed.set()


def test_batches_of_features_and_steps_of_probes_are_progress(monkeypatch):
    watch = SimpleNamespace(place="", position=0, moves=0)
    monkeypatch.setattr(watching, "_watch", watch)
    numbers = [torch.tensor([number]) for number in range(4)]
    batches = [{"image": torch.zeros(1, 3), "label": number % 2, "index": number} for number in numbers]
    found = extract_features(lambda images: {"f": torch.ones(1, 2)}, batches, 4, {"f": (2,)}, "cpu")
    assert watch.moves == 4 and watch.place == "features of batch 4"
    rows, labels = torch.from_numpy(found["f"]), torch.from_numpy(found["labels"])
    assert len([*probe_batches(torch.arange(4), 3, 2, 0)]) == 6
    assert watch.moves == 10 and watch.place == "epoch 3 of a probe"
    knn_hits(rows, labels, rows, labels, 2, [1])
    assert watch.place == "searching neighbours"
    fit_logistic(rows.float(), labels, 2, 1.0)
    assert watch.place == "a logistic regression"


# What is said.


def test_signals_are_explained():
    assert str(ended_by("rank 1", signal.SIGKILL)).startswith(
        "rank 1 was ended by SIGKILL: most likely the machine ran"
    )
    assert "/dev/shm" in str(ended_by("rank 1", signal.SIGBUS)) and ended_by("rank 1", 9).status == 137
    assert str(ended_by("rank 1", signal.SIGRTMIN + 2)).startswith("rank 1 was ended by signal 3")
    full = RuntimeError("unable to write to file </torch_12_34_0>: No space left on device (28)")
    assert "shared memory (/dev/shm)" in str(explained(full)) and explained(full).status == 2
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert "worker was ended by SIGKILL" in str(explained(killed))
    assert explained(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert explained(OSError(28, "No space left on device")) is None  # not a loader's


class Failures(Exception):
    """As the launcher's ChildFailedError: exit statuses of the ranks."""

    def __init__(self, *codes):
        self.failures = {rank: type("Failure", (), {"exitcode": code, "pid": 7}) for rank, code in enumerate(codes)}


def test_the_launcher_gives_the_status_of_the_one_that_failed(tmp_path, capsys):
    assert failed(Failures(-15, -9), str(tmp_path)) == 137
    error = capsys.readouterr().err
    assert error.startswith("error: rank 1 (process 7) was ended by SIGKILL: most likely the machine ran out of memory")
    assert error.endswith(f"nothing is saved in {tmp_path}\n") and error.count("\n") == 1
    assert failed(Failures(1, -11), None) == 139 and "starts it again" in capsys.readouterr().err
    assert failed(Failures(-15, 3), None) == 3 and failed(Failures(1, 1), None) == 1
    assert capsys.readouterr().err == ""  # the process has said why
    assert failed(Failures(-9, 124), str(tmp_path)) == 124 and "nothing is saved" in capsys.readouterr().err
    with pytest.raises(Stopped) as stopped:
        failed(Failures(138, -15), None)
    assert stopped.value.status == 138
    (tmp_path / "latest.pth").symlink_to("epoch_3.pth")
    (tmp_path / "epoch_3.pth").touch()
    assert continues(str(tmp_path)) == f"the run continues from {tmp_path}/epoch_3.pth with --resume"


def test_a_port_in_use_is_one_line(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "node0")
    monkeypatch.setenv("MASTER_PORT", "20007")
    assert cannot_meet(RuntimeError("port: 20007, EADDRINUSE")).startswith("node0:20007 is in use")
    store = torch.distributed.TCPStore("localhost", 0, 1, True)
    given = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    for name, value in {**given, "MASTER_PORT": str(store.port)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^localhost:{store.port} is in use, by another run or program: set PORT"):
        join()


@pytest.mark.slow
def test_a_process_that_does_not_answer_is_waited_for_as_long_as_asked():
    """torch.distributed's own limit, for when the watch itself cannot end the run."""
    code = (
        "import os, time, torch; from semaim.engine import launcher, watching\n"
        "watching.watch = lambda timeout: None\n"
        "def work(_):\n"
        "    if os.environ['RANK'] == '1': time.sleep(60)\n"
        "    torch.distributed.barrier()\n"
        "print(launcher.command(lambda _: None, work, 1, 1.0, 'nowhere'), flush=True); os._exit(0)\n"
    )
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = {**os.environ, **CPU, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([*line, sys.executable, "-c", code], env=env, **pipes) as run:
        assert run.stdout.readline() == "124\n"
        run.terminate()
        said = "rank 0: another process has not answered within --timeout; nothing is saved in nowhere\n"
        assert said in run.stderr.read()


# Signals.


def test_only_a_second_ctrl_c_ends_at_once(monkeypatch, tiny_config):
    class Loop(stopping.Resumable):
        def __init__(self):
            self._runner = type("R", (), {"message_hub": type("H", (), {"get_info": lambda *_: "train"})()})()

    loop = Loop()
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):  # as a scheduler repeats itself
        loop._on_signal(number, None)
    assert loop.stop_signal == signal.SIGUSR1 and loop.stopping
    loop = Loop()
    loop._on_signal(signal.SIGINT, None)
    loop._on_signal(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt) as second:
        loop._on_signal(signal.SIGINT, None)
    assert not isinstance(second.value, Stopped)


def test_several_processes_save_in_a_validation_and_go_on(monkeypatch):
    saves = []
    loop = SimpleNamespace(stop_signal=None, saved=False, save=lambda alone: saves.append(alone))
    runner, hook = SimpleNamespace(train_loop=loop, model=torch.nn.Linear(1, 1)), stopping.Validating()
    hook.before_val_iter(runner, 0)
    loop.stop_signal = signal.SIGUSR1
    monkeypatch.setattr(stopping, "is_main_process", lambda: False)
    hook.before_val_iter(runner, 1)
    assert saves == []
    monkeypatch.setattr(stopping, "is_main_process", lambda: True)
    hook.before_val_iter(runner, 2)
    hook.before_val_iter(runner, 3)
    assert saves == [True]


@linux
@pytest.mark.parametrize(
    ("number", "everyone"),
    [(signal.SIGHUP, False), pytest.param(signal.SIGUSR1, True, marks=pytest.mark.slow)],
)
def test_a_signal_saves_and_gives_its_status(tiny_config, number, everyone):
    cfg = tiny_config(**LONG, num_workers=1)
    run = begin(cfg)
    for pid in [run.pid, *(workers(run.pid) if everyone else [])]:
        os.kill(pid, number)
    status, lines = ended(run)
    assert status == 128 + number
    assert lines == [f"{number.name}: stopping after this iteration", "interrupted"]
    assert read_checkpoint(Path(cfg.work_dir) / "interrupted.pth")["step"] >= 2


# Processes.


@linux
@pytest.mark.slow
def test_a_killed_worker_is_named_and_the_state_saved(tiny_config):
    options = {"train_cfg.max_epochs": 40, "default_hooks.checkpoint.interval": 40}
    whole, parts = tiny_config("whole", **options), tiny_config("parts", **options)
    train(whole)
    run = begin(tiny_config("parts", **options, num_workers=1))
    [worker] = workers(run.pid)
    os.kill(worker, signal.SIGKILL)
    status, lines = ended(run)
    assert status == 137 and len(lines) == 1
    assert lines[0].startswith(f"error: a data loader's worker (process {worker}) was ended by SIGKILL: most likely")
    goes_on(parts, whole)


@linux
@pytest.mark.slow
def test_a_killed_rank_is_named_and_rank_0_saves(tiny_config):
    options = {"train_cfg.max_epochs": 60, "default_hooks.checkpoint.interval": 60, "model.network.order": "raster"}
    whole, parts = tiny_config("whole", **options), tiny_config("parts", **options)
    train(whole)
    run = begin(parts, "--gpus", 2)
    pid = ranks(run)[1]
    os.kill(pid, signal.SIGKILL)
    status, lines = ended(run)
    assert status == 137 and len(lines) == 1
    assert lines[0].startswith(f"error: rank 1 (process {pid}) was ended by SIGKILL: most likely")
    assert lines[0].endswith("interrupted.pth with --resume")
    assert goes_on(parts, whole) >= 1


@linux
@pytest.mark.slow
def test_what_another_process_than_the_first_saves_belongs_to_the_same_run(tiny_config, tmp_path):
    options = {"train_cfg.max_epochs": 6, "default_hooks.checkpoint.keep": 3, "model.network.order": "raster"}
    cfg = tiny_config("parts", **options)
    cfg.dump(tmp_path / "config.py")
    code = (
        "import os, sys; from mmengine.config import Config; from semaim.engine import launcher, stopping\n"
        "from semaim.engine.training import train; from semaim.errors import UserError, run\n"
        "def bad(self, index, batch, before=stopping.Resumable.run_iter):\n"
        "    if os.environ['RANK'] == '1' and self._iter == 17: raise UserError('a bad image')\n"
        "    before(self, index, batch)\n"
        "stopping.Resumable.run_iter = bad\n"
        "work = lambda _: train(Config.fromfile(sys.argv[1]))\n"
        "sys.exit(run(lambda: launcher.command(lambda _: None, work, 1, 100.0)))\n"
    )
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    line += [sys.executable, "-c", code, tmp_path / "config.py"]
    env = {**os.environ, **CPU, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=120)
    assert "error: a bad image" in done.stderr, done.stderr
    folder = Path(cfg.work_dir)
    assert os.readlink(folder / "latest.pth") == "interrupted.pth"
    first, last = (read_checkpoint(folder / name) for name in ("epoch_3.pth", "interrupted.pth"))
    assert last["step"] == 17 and last["data"] == first["data"] and last["data"]
    assert last["config"]["origin"] == first["config"]["origin"] and last["saving"]["run"] == first["saving"]["run"]
    times = {name: (folder / name).stat().st_mtime_ns for name in ("epoch_1.pth", "epoch_2.pth", "epoch_3.pth")}
    assert last["saving"]["written"] == times
    train(tiny_config("parts", **options), str(folder / "latest.pth"), strict_data=True)
    assert {path.name for path in folder.glob("epoch_*.pth")} == {"epoch_4.pth", "epoch_5.pth", "epoch_6.pth"}


def test_what_a_forward_pass_changes_is_not_saved_in_the_middle_of_an_iteration():
    norms = {"own": torch.nn.BatchNorm2d(2), "shared": torch.nn.SyncBatchNorm(2), "none": torch.nn.LayerNorm(2)}
    norms["batch"] = torch.nn.BatchNorm2d(2, track_running_stats=False)
    changed = [name for name, norm in norms.items() if has_running_statistics(torch.nn.Sequential(norm))]
    assert changed == ["own", "shared"]


def test_a_process_whose_launcher_ended_while_it_started_ends_too(monkeypatch):
    monkeypatch.setattr("semaim.engine.launcher.join", lambda timeout: pytest.fail("it waits for the others"))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), (SPAWNED, "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("semaim.engine.launcher.end_with_parent", lambda: True)
    assert run_command(None, None, 2, 10, None) == 1


def test_workers_that_could_not_hand_over_a_batch_are_refused(tiny_config, tmp_path):
    folder = tmp_path / ("t" * 100)
    folder.mkdir()
    line = ["train.py", SCENES, *flags(tiny_config(num_workers=1))]
    one_line(tool(*line, TMPDIR=str(folder)), "set it to a shorter path, or --cfg-options num_workers=0")
