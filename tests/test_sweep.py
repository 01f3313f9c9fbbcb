"""The search of learning rate and layer decay, run for real: it skips, goes on, refuses, tabulates."""

import csv
import importlib.util
import json
import math
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import commands
import pytest
from schedules import rates

from semaim.cli.sweep import parse_args
from semaim.engine.config import load_config
from semaim.errors import UserError
from semaim.results.running import shortened
from semaim.results.sweeping import DECAY, plan, short

ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
SCENES = "mmseg_configs/semaim_upernet_scenes.py"
LINEAR = "semaim/configs/linear/vit_tiny_scenes.py"
SMALL = {
    "model.backbone.embed_dim": 32,
    "model.backbone.num_heads": 2,
    "model.neck.embed_dim": 32,
    "model.decode_head.in_channels": "32,32,32,32",
    "model.auxiliary_head.in_channels": 32,
    "num_workers": 0,
    "total_batch_size": 4,
    "default_hooks.checkpoint.interval": 1,
    "default_hooks.logger.interval": 1,
    "log_processor.window_size": 1,
}

spec = importlib.util.spec_from_file_location("sweep", ROOT / "tools/sweep.py")
sweep = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sweep)


def line(*arguments):
    """The tool's command line."""
    return [sys.executable, str(ROOT / "tools/sweep.py"), *map(str, arguments)]


def tool(*arguments):
    """The tool, run for real on the CPU."""
    return commands.tool("sweep.py", *arguments)


@pytest.fixture
def here(monkeypatch, capfd):
    """A function that runs the tool in this process, which is sooner; exit status, output, error."""

    def call(*arguments):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["sweep.py", *map(str, arguments)])
        for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
            monkeypatch.setenv(name, ENV[name])
        capfd.readouterr()
        return sweep.run(sweep.main), *capfd.readouterr()

    return call


def refused(done, *messages):
    """A failure as users see it."""
    status, output, error = done
    assert status == 2 and all(message in error for message in messages), error
    assert len(error.strip().splitlines()) == 1 and not output


def table(output):
    """The lines of the table."""
    rows = output.splitlines()
    first = next(number for number, row in enumerate(rows) if row.startswith("| run |"))
    return [row for row in rows[first:] if row.startswith("|")]


def metrics(folder):
    """What a run measured."""
    return json.loads((folder / "results.json").read_text())["metrics"]


def fake(work, name, lr, decay, figures, settings=None):
    """A run as if it had finished."""
    (work / name).mkdir(parents=True)
    record = {"base_lr": lr, "peak_lr": lr / 2, "layer_decay": decay, "settings": settings or {"options": {}}}
    (work / name / "sweep.json").write_text(json.dumps(record))
    if figures is not None:
        (work / name / "results.json").write_text(json.dumps({"metrics": figures}))


# The schedule of a shorter run.


def test_a_shorter_segmentor_keeps_the_shape_of_its_schedule():
    cfg = load_config(ROOT / "mmseg_configs/semaim_upernet.py")
    assert shortened(cfg) == {}
    assert shortened(cfg, iters=16000) == {  # a tenth of 160,000
        "train_cfg.max_iters": 16000,
        "train_cfg.val_interval": 16000,
    }
    cfg.merge_from_dict(shortened(cfg, iters=16000))
    found = rates(cfg)  # 1,500 steps of warm-up, of 160,000
    assert found[0] == pytest.approx(1e-6) and found[148] < 0.99 and found[150] == pytest.approx(1)
    assert found[151:] == pytest.approx([1 - (step - 150.9) / 15848.1 for step in range(151, 16000)], abs=1e-12)
    with pytest.raises(UserError, match="has no max_epochs: give --iters"):
        shortened(cfg, epochs=3)
    with pytest.raises(UserError, match="give 1 or more"):
        shortened(cfg, iters=0)


def test_a_shorter_detector_keeps_the_shares_of_its_milestones():
    cfg = load_config(ROOT / "mmdet_configs/semaim_mask_rcnn.py")
    options = shortened(cfg, iters=7375)  # 184,375 / 25: 250 -> 10, 163,889 -> 6555.56, 177,546 -> 7101.84
    assert options == {"train_cfg.max_iters": 7375, "train_cfg.val_interval": 7375}
    cfg.merge_from_dict(options)
    found = rates(cfg)
    assert [step for step in range(1, 7375) if found[step] < found[step - 1]] == [6556, 7102]
    assert (
        found[9] < 0.91
        and found[10] == pytest.approx(1)
        and [round(step / 7375, 3) for step in (6556, 7102)] == [0.889, 0.963]
    )
    cosine = load_config(ROOT / "mmdet_configs/semaim_mask_rcnn_li2021.py")
    cosine.merge_from_dict(shortened(cosine, iters=7375))
    found = rates(cosine)  # 461 / 25 = 18.44 steps of warm-up
    assert found.argmax() == 19 and found[7374] == pytest.approx((math.pi / 7375 / 2) ** 2, rel=1e-3)


def test_epochs_are_all_that_changes():
    cfg = load_config(ROOT / "semaim/configs/finetune/vit_base_100e.py")
    changed = {"train_cfg.max_epochs": 10, "train_cfg.val_interval": 10}
    assert shortened(cfg, epochs=10) == changed
    with pytest.raises(UserError, match="has no max_iters: give --epochs"):
        shortened(cfg, iters=100)


@pytest.mark.parametrize("iters", [2, 3, 50])
@pytest.mark.parametrize("name", ["mmseg_configs/semaim_upernet.py", "mmdet_configs/semaim_mask_rcnn.py"])
def test_however_short_the_rate_reaches_its_peak(name, iters):
    cfg = load_config(ROOT / name)
    cfg.merge_from_dict(shortened(cfg, iters=iters))
    found = rates(cfg)
    assert found[0] < 0.01 and found[1] == pytest.approx(1) and max(found) == pytest.approx(1)
    assert iters < 50 or found[-1] < 0.02


@pytest.mark.parametrize(
    ("number", "text"),
    [(1e-4, "1e-4"), (0.00025, "2.5e-4"), (1.23456789e-5, "1.23456789e-5"), (0.1, "0.1"), (1, "1"), (30.0, "30")],
)
def test_numbers_are_short_and_whole(number, text):
    assert short(number) == text and float(text) == number


# Whole sweeps.


@pytest.mark.slow
def test_a_sweep_trains_once_and_goes_on_where_it_was_cut(tmp_path, here):
    pytest.importorskip("mmseg", reason="mmsegmentation is not installed: runs after tools/setup.sh --extras all")
    from semaim.data.scenes import write_scenes

    write_scenes(tmp_path / "scenes", 15, 64, seed=0)
    work = tmp_path / "work"
    options = [f"{key}={value}" for key, value in SMALL.items()]
    start = [SCENES, "--layer-decay", 0.65, "--data-root", tmp_path / "scenes/ade", "--work-dir", work]
    start += ["--cfg-options", *options]
    first = tool(*start, "--iters", 2, "--lr", 1e-3, 2e-3)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    runs = [work / "lr1e-3_ld0.65", work / "lr2e-3_ld0.65"]
    typed = [shlex.split(row) for row in first.stdout.splitlines() if "tools/train.py" in row]
    for words, folder, lr in zip(typed, runs, ("1e-3", "2e-3"), strict=True):
        assert words[1:3] == ["tools/train.py", SCENES] and words[words.index("--work-dir") + 1] == str(folder)
        last = words[words.index("--cfg-options") + 1 :]
        assert {*options, f"base_lr={lr}", f"{DECAY}=0.65", "train_cfg.max_iters=2"} - {*last} == {
            "model.decode_head.in_channels=32,32,32,32"  # written as a list
        }
    # The command did what it says: 2e-3 x 4 / 16, reached in the second of two steps.
    assert "learning rate 0.0005 = 0.002 x 4 / 16" in first.stdout and "schedule: 2 steps" in first.stdout
    rows = list(csv.DictReader((work / "sweep.csv").open()))
    assert {row["run"]: float(row["mIoU"]) for row in rows} == {path.name: metrics(path)["mIoU"] for path in runs}
    assert [row["best"] for row in rows] == ["best", ""] and float(rows[0]["mIoU"]) >= float(rows[1]["mIoU"])
    assert table(first.stdout) == (work / "sweep.md").read_text().splitlines()[:4]

    again = tool(*start, "--iters", 2, "--lr", 1e-3, 2e-3)
    assert again.returncode == 0 and "tools/train.py" not in again.stdout and "has finished" in again.stdout
    shown = here(SCENES, "--table", "--work-dir", work)
    assert table(first.stdout) == table(again.stdout) == table(shown[1]), shown[2]

    # Cut after the first of two steps.
    whole = metrics(runs[1])
    (runs[1] / "results.json").unlink()
    (runs[1] / "iter_2.pth").unlink()
    (runs[1] / "latest.pth").unlink()
    (runs[1] / "latest.pth").symlink_to("iter_1.pth")
    refused(here(*start, "--iters", 3, "--lr", 1e-3), "train_cfg.max_iters = 2, now it is 3", "--work-dir")
    moved = [tmp_path / "other" if word == tmp_path / "scenes/ade" else word for word in start]
    refused(here(*moved, "--iters", 2, "--lr", 5e-3), "data_root", "other: choose another --work-dir")
    resumed = tool(*start, "--iters", 2, "--lr", 1e-3, 2e-3)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert " --resume " in resumed.stdout and resumed.stdout.count("tools/train.py") == 1
    assert metrics(runs[1]) == pytest.approx(whole, abs=1e-6) and table(resumed.stdout) == table(first.stdout)


@pytest.mark.slow
def test_ctrl_c_saves_and_the_next_start_goes_on(labelled, tmp_path, here):
    work = tmp_path / "work"
    small = {
        "model.network.img_size": 32,
        "model.network.embed_dim": 32,
        "model.network.depth": 1,
        "model.network.num_heads": 2,
        "total_batch_size": 8,
        "num_workers": 0,
        "default_hooks.logger.interval": 1,
    }
    options = [f"{key}={value}" for key, value in small.items()]
    # 200 epochs are some seconds: the signal is there long before their end.
    start = [LINEAR, "--epochs", 200, "--data-root", labelled, "--work-dir", work, "--cfg-options", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Where the tests run in a shell's background, it has SIGINT ignored, and so would they.
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(line(*start, "--lr", 0.1, 0.2), **pipes, env=ENV, cwd=ROOT) as child:
        for row in child.stdout:
            if "epoch   2/200" in row:
                break
        child.send_signal(signal.SIGINT)
        rest, errors = child.communicate(timeout=100)
    assert child.returncode == 130 and errors.splitlines()[-1].startswith("interrupted in lr0.1: "), rest + errors
    assert (work / "lr0.1/latest.pth").resolve().name == "interrupted.pth"
    assert not (work / "lr0.1/results.json").exists() and not (work / "lr0.2").exists()

    status, output, error = here(*start, "--lr", 0.1)
    assert status == 0, error[-3000:]
    assert "resumed from" in output and output.count(" --resume ") == 1
    (row,) = csv.DictReader((work / "sweep.csv").open())
    assert (row["run"], row["layer_decay"], float(row["top1"])) == ("lr0.1", "", metrics(work / "lr0.1")["top1"])


def test_a_failed_run_stops_the_sweep_with_its_status(tmp_path, here):
    places = ["--data-root", tmp_path / "nowhere", "--work-dir", tmp_path / "work"]
    status, output, error = here(LINEAR, "--lr", 0.1, 0.2, *places)
    assert status == 2 and output.count("tools/train.py") == 1
    first, last = error.strip().splitlines()
    assert "nowhere" in first and last == "lr0.1 failed with exit status 2; what has finished stays"


def test_a_rate_that_diverges_is_told_and_the_sweep_goes_on(labelled, tmp_path, here):
    small = ["num_workers=0", "model.network.embed_dim=32", "model.network.num_heads=2", "model.network.depth=1"]
    places = ["--data-root", labelled, "--work-dir", tmp_path]
    start = [LINEAR, "--epochs", 3, *places, "--cfg-options", *small, "total_batch_size=8", "--lr", 1e39, 0.1]
    status, output, error = here(*start)
    assert status == 0 and "the run diverged" in error, error[-3000:]
    assert f"Diverged: lr{10**39}." in output and "Not finished" not in output
    status, output, error = here(*start)
    assert (
        status == 0
        and f"run 1 of 2, lr{10**39}: has diverged" in output
        and "run 2 of 2, lr0.1: has finished" in output
    )


# The table.


def test_the_table_says_where_to_look_further(tmp_path, here):
    for lr, decay, figure in ((1e-4, 0.65, 40.0), (2e-4, 0.65, 42.0), (2e-4, 0.75, 43.5), (4e-4, 0.75, None)):
        figures = figure and {"aAcc": 90 - figure, "mIoU": figure, "mAcc": 50.0}
        fake(tmp_path, f"lr{lr:g}_ld{decay}", lr, decay, figures)
    status, output, error = here("any.py", "--table", "--work-dir", tmp_path)
    assert status == 0, error
    head, _, *rows = table(output)
    assert [cell.strip() for cell in head.split("|")][5:8] == ["mIoU", "mAcc", "aAcc"]
    assert [row.split("|")[1].strip() for row in rows] == [
        "lr0.0002_ld0.75", "lr0.0002_ld0.65", "lr0.0001_ld0.65", "lr0.0004_ld0.75",
    ]  # fmt: skip
    assert "best" in rows[0] and not any("best" in row for row in rows[1:])
    assert "The best base_lr, 2e-4, is the highest that was tried: try higher ones too." in output
    assert "The best layer_decay, 0.75, is the highest" in output
    assert "Not finished, or nothing was predicted: lr0.0004_ld0.75" in output
    assert "| best |" in table(here("any.py", "--table", "--work-dir", tmp_path, "--metric", "aAcc")[1])[2]
    refused(here("any.py", "--table", "--work-dir", tmp_path, "--metric", "miou"), "known are aAcc, mAcc, mIoU")


def test_box_and_mask_figures_stand_side_by_side_and_the_middle_needs_no_remark(tmp_path, here):
    for lr, box in ((1e-4, 0.4), (2e-4, 0.513), (4e-4, 0.45)):
        figures = {"coco/bbox_mAP": box, "coco/bbox_mAP_50": 0.9, "coco/segm_mAP": box - 0.06}
        fake(tmp_path, f"lr{lr:g}", lr, 0.7, figures)
    _, out, _ = here("any.py", "--table", "--work-dir", tmp_path)
    assert "| lr0.0002 | 0.0002 | 0.0001 | 0.7 | 0.513 | 0.453 | best |" in out
    assert "tried" not in out and "bbox_mAP_50" not in out
    _, out, _ = here("any.py", "--table", "--work-dir", tmp_path, "--metric", "coco/bbox_mAP_50")
    assert "| coco/bbox_mAP_50 | coco/bbox_mAP |" in out


def test_of_losses_the_lowest_is_the_best(tmp_path, here):
    fake(tmp_path, "a", 1e-4, None, {"top1": 50.0, "loss": 1.0})
    fake(tmp_path, "b", 2e-4, None, {"top1": 60.0, "loss": 2.0})
    for metric, best in (("loss", "a"), ("top1", "b")):
        here("any.py", "--table", "--work-dir", tmp_path, "--metric", metric)
        rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
        assert rows[0]["run"] == best and rows[0]["best"] == "best"


def test_equal_figures_say_nothing_about_the_border(tmp_path, here):
    for name, lr in (("a", 1e-4), ("b", 2e-4)):
        fake(tmp_path, name, lr, 0.65, {"mIoU": 0.0})
    status, output, _ = here("any.py", "--table", "--work-dir", tmp_path)
    assert status == 0 and "tried" not in output


# What is wrong is said before anything starts.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py", "--lr", "1"], "no such config"),
        ([LINEAR, "--lr", "1", "--layer-decay", "0.7"], "has no layer decay"),
        ([LINEAR, "--lr", "0"], "--lr 0: give numbers above 0"),
        ([LINEAR, "--lr", "1", "--cfg-options", "base_lr=2"], "base_lr is given twice"),
        ([LINEAR, "--lr", "1", "--cfg-options", "base_lr"], "KEY=VALUE"),
        ([LINEAR, "--lr", "1", "--cfg-options", "sed=2"], "did you mean seed"),
        ([LINEAR, "--lr", "1", "--iters", "10"], "give --epochs N"),
        ([SCENES, "--layer-decay", "1.5"], "--layer-decay 1.5: give numbers above 0, at most 1"),
        (["semaim/configs/pretrain/semaim_vit_tiny_scenes.py", "--lr", "1"], "a stage with a base_lr"),
        (["semaim/configs/knn/vit_tiny_scenes.py", "--lr", "1"], "a stage with a base_lr"),
        ([LINEAR, "--table"], "has measured anything yet"),
    ],
)
def test_errors(arguments, message, tmp_path, here):
    refused(here("--work-dir", tmp_path / "work", *arguments), message)
    assert not (tmp_path / "work").exists()


def test_runs_of_other_origin_are_left_alone(tmp_path, here):
    (tmp_path / "work/lr0.1").mkdir(parents=True)
    (tmp_path / "work/lr0.1/results.json").write_text(json.dumps({"metrics": {"top1": 1.0}}))
    refused(here(LINEAR, "--lr", 0.1, "--work-dir", tmp_path / "work"), "a run that no sweep started", "--work-dir")


def test_the_name_of_an_encoder_is_no_path(monkeypatch, tmp_path):
    """Its runs are the same ones from any folder."""
    config = str(ROOT / "semaim/configs/finetune/plain_vit_100e.py")
    words = [config, "--lr", "1e-3", "--epochs", "1", "--pretrained", "timm:eva02_tiny_patch14_224"]
    monkeypatch.chdir(tmp_path)
    (record,) = plan(parse_args(words)).values()
    assert record["settings"]["pretrained"] == "timm:eva02_tiny_patch14_224"
    assert record["settings"]["config"] == config
