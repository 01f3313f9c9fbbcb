"""W&B and MLflow, offline, read back; a tracker that fails; a run with them is the same run."""

import json
import os
import signal
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from commands import flags, losses, one_line, results, tool
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from semaim.checkpoints.files import run_in
from semaim.cli import train as command
from semaim.engine import tracking
from semaim.engine.training import train
from semaim.errors import UserError

wandb = pytest.importorskip("wandb", reason="no wandb: runs after tools/setup.sh")
mlflow = pytest.importorskip("mlflow", reason="no mlflow: runs after tools/setup.sh")

TINY = "semaim/configs/pretrain/semaim_vit_tiny_scenes.py"


@pytest.fixture(autouse=True)
def local(monkeypatch):
    """No network, and nothing of the user's."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("MLFLOW_TRACKING_URI", "WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


def records(file):
    """The records of a .wandb file: a log of LevelDB's (32 KB blocks; before each part checksum, length, kind)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = Path(file).read_bytes(), 7, []
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if left < 7 or kind == 0:
            place += left
            continue
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # whole, or last
            record = Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def history(file):
    """The rows that a run has logged."""
    rows = []
    for record in records(file):
        if record.WhichOneof("record_type") == "history":
            items = ((item.key or item.nested_key[0], item.value_json) for item in record.history.item)
            rows.append({key: json.loads(value) for key, value in items})
    return rows


def wandb_files(folder):
    """The files of the parts of a run, in order of time."""
    return sorted(Path(folder).glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)


def mlflow_run(folder, experiment):
    """The one run of an experiment beside a work folder, and its client."""
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # as docs/track.md says
    client = mlflow.MlflowClient((Path(folder).resolve().parent / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return client, run


def test_a_tracked_run_is_the_same_run_and_can_be_read_back(tiny_config, tmp_path):
    train(tiny_config("plain"))
    cfg = tiny_config("tracked", **{"default_hooks.pictures.interval": 2, "default_hooks.pictures.images": 2})
    cfg.trackers = {"wandb": "orders", "mlflow": "orders & more"}
    train(cfg)
    plain, tracked = losses(tmp_path / "plain"), losses(tmp_path / "tracked")
    assert plain == tracked and len(plain) == 10  # all digits
    name = run_in(tmp_path / "tracked/latest.pth")

    (file,) = wandb_files(tmp_path / "tracked")
    assert name in file.name
    rows = history(file)
    assert {row["iteration"]: row["loss"] for row in rows if "loss" in row} == pytest.approx(tracked)
    pictures = [row["iteration"] for row in rows if "orders" in row]
    assert pictures == [0, 10]  # before and after
    (begun,) = (record.run for record in records(file) if record.WhichOneof("record_type") == "run")
    assert (begun.run_id, begun.project, begun.display_name) == (name, "orders", "tracked")
    settings = {
        item.key: json.loads(item.value_json)
        for record in records(file)
        if record.WhichOneof("record_type") == "config"
        for item in record.config.update
    }
    assert settings["total_batch_size"] == 8 and settings["model"]["network"]["embed_dim"] == 32

    client, run = mlflow_run(tmp_path / "tracked", "orders & more")
    assert run.info.status == "FINISHED" and run.data.tags["semaim.run"] == name
    assert run.data.params["model.network.embed_dim"] == "32" and run.info.run_name == "tracked"
    assert {m.step: m.value for m in client.get_metric_history(run.info.run_id, "loss")} == tracked
    names = [artifact.path for artifact in client.list_artifacts(run.info.run_id, "orders")]
    assert names == ["orders/iteration_0000000.png", "orders/iteration_0000010.png"]


@HOOKS.register_module()
class Cut(Hook):
    """The network is lost after the third iteration: MLflow's server and W&B's process end."""

    cut = staticmethod(lambda: None)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 2:
            runner.visualizer.get_backend("mlflow").waiting.put((self.cut, ()))


class Server(BaseHTTPRequestHandler):
    """As much of MLflow's API as a run needs; `heard` has the metrics."""

    heard: list = []

    def do_GET(self):  # noqa: N802
        self.answer({"experiment": {"experiment_id": "1", "name": "semaim", "lifecycle_stage": "active"}})

    def do_POST(self):  # noqa: N802
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.heard.extend(asked.get("metrics", ()))
        info = {"run_id": "7", "run_uuid": "7", "experiment_id": "1", "status": "RUNNING", "lifecycle_stage": "active"}
        self.answer({"run": {"info": info, "data": {}}, "run_info": info} if "search" not in self.path else {})

    def answer(self, content):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_):
        """No lines in the test's output."""


@pytest.mark.skipif(sys.platform != "linux", reason="finds W&B's process in /proc: runs on Linux")
def test_trackers_that_are_lost_do_not_change_or_end_a_run(tiny_config, tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    monkeypatch.setattr(Server, "heard", [])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    def cut():
        server.shutdown()
        server.server_close()
        for path in Path("/proc").glob("[0-9]*/stat"):
            number, name, _, parent = path.read_text().split()[:4]
            if name == "(wandb-core)" and int(parent) == os.getpid():
                os.kill(int(number), signal.SIGKILL)

    monkeypatch.setattr(Cut, "cut", staticmethod(cut))
    train(tiny_config("plain"))
    cfg = tiny_config("tracked", custom_hooks=[{"type": "Cut"}])
    cfg.trackers = {"mlflow": "", "wandb": ""}
    train(cfg)
    with suppress(ConnectionError):
        wandb.teardown()  # for other runs of this process to have a process of W&B's again
    assert losses(tmp_path / "plain") == losses(tmp_path / "tracked")
    (log,) = (tmp_path / "tracked").glob("2*/*.log")
    warnings = [line for line in log.read_text().splitlines() if "WARNING" in line]
    assert len(warnings) == 2 and all("the run goes on" in line for line in warnings), warnings
    assert sorted({"W&B" in line for line in warnings}) == [False, True]
    assert 1 <= len({metric["step"] for metric in Server.heard if metric["key"] == "loss"}) <= 4


@pytest.mark.slow
def test_the_commands_track_and_resume_the_same_run(labelled, pretrained, tmp_path):
    options = {
        "model.network.img_size": 32, "model.network.embed_dim": 32, "model.network.num_heads": 2,
        "model.network.depth": 2, "total_batch_size": 8, "num_workers": 0, "train_cfg.max_epochs": 2,
        "param_scheduler.warmup": 0.5, "default_hooks.logger.interval": 1, "log_processor.window_size": 1,
        "default_hooks.checkpoint.interval": 1,
    }  # fmt: skip
    config, folder = "semaim/configs/finetune/vit_tiny_scenes.py", tmp_path / "run"
    common = [config, "--work-dir", folder]
    network = {"WANDB_MODE": "offline"}
    done = tool("train.py", *common, "--data-root", labelled, "--pretrained", pretrained, "--wandb", "--mlflow",
                "tuned", *flags(options), **network)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "W&B, project semaim: " in done.stdout and "MLflow, experiment tuned: file:" in done.stdout
    first = losses(folder)
    done = tool("train.py", *common, "--resume", folder / "epoch_1.pth", **network)  # the trackers are the run's own
    assert done.returncode == 0, done.stderr
    assert "trackers.wandb = semaim" in done.stdout
    before, after = wandb_files(folder)
    assert before.name == after.name == f"run-{run_in(folder / 'latest.pth')}.wandb"
    steps = sorted(first)
    again = {row["iteration"]: row["loss"] for row in history(after) if "loss" in row}
    assert again == pytest.approx({step: first[step] for step in steps[len(steps) // 2 :]})
    figures = {
        item.key or item.nested_key[0]: json.loads(item.value_json)
        for record in records(after)
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }
    metrics = results(folder)["metrics"]
    assert metrics and {name: figures[name] for name in metrics} == pytest.approx(metrics)
    client, run = mlflow_run(folder, "tuned")
    assert run.info.status == "FINISHED"
    assert {f"results/{name}": value for name, value in metrics.items()}.items() <= run.data.metrics.items()
    logged = [m.step for m in client.get_metric_history(run.info.run_id, "loss")]
    assert sorted(logged) == sorted([*steps, *steps[len(steps) // 2 :]])
    # By epoch, at the iteration of its end.
    (name, *_) = [f"val/{name}" for name in metrics if f"val/{name}" in run.data.metrics]
    assert {m.step for m in client.get_metric_history(run.info.run_id, name)} == {steps[len(steps) // 2 - 1], steps[-1]}


def test_what_cannot_be_tracked_is_one_line_before_training(tiny_config, here, tmp_path, monkeypatch):
    cfg = tiny_config()
    cfg.trackers = {"wndb": ""}
    with pytest.raises(UserError, match="trackers.wndb: no such tracker: did you mean wandb"):
        train(cfg)
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    line = ["train.py", TINY, "--data-root", cfg.dataset.root, "--work-dir", tmp_path / "out", "--wandb"]
    one_line(here(*line), "--wandb: the package wandb is not installed: ")
    monkeypatch.setattr(tracking, "IN_CHECKOUT", False)
    one_line(here(*line), "pip install 'semaim[wandb]'")
    monkeypatch.undo()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody answers
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    cfg = tiny_config()
    cfg.trackers = {"mlflow": "x"}
    with pytest.raises(UserError, match="--mlflow: cannot start: .*without MLFLOW_TRACKING_URI it needs no network"):
        train(cfg)
    assert not list(Path(cfg.work_dir).glob("*.pth"))


def test_the_flags_take_a_name_or_none():
    def given(*words):
        args = command.make_parser().parse_args([TINY, *words])
        return args.wandb, args.mlflow

    assert given() == (None, None)
    assert given("--wandb", "--mlflow", "x") == ("", "x")
    cfg = {"trackers": {"mlflow": None}}
    assert tracking.asked(cfg) == {} and cfg["trackers"] == {"mlflow": None}


def test_parameters_are_what_mlflow_takes():
    config = {"a": {"b": [{"type": "X", "k": (1, 2)}], "c": None}, "l r": "x" * 9000, "ü": 1}
    found = tracking.parameters(config)
    assert found == {"a.b.0.type": "X", "a.b.0.k": "(1, 2)", "a.c": "None", "l r": "x" * 500, "_": "1"}
