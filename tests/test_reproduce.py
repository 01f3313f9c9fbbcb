"""From images to the table in one command: it runs, skips, goes on after a kill, refuses; the plan and its costs."""

import csv
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from commands import results, tool

from semaim.data.scenes import LEVELS
from semaim.engine.config import load_config
from semaim.engine.results import origin_of, title_of
from semaim.registry import variants
from semaim.results import pipeline
from semaim.results.running import Children
from semaim.results.runs import reported
from semaim.results.stages import plan, stage_names

ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": ENV, "cwd": ROOT}
SMALL = ["images=130", "unlabelled=80", "size=32", "pretrain=4", "finetune=2", "detection=2", "segmentation=2"]
QUICK = ["--scale", "quick", "--length", *SMALL]
VARIANTS, STAGES = list(variants()), stage_names()
MADE = [name for name in STAGES if name != "attentive"]  #: stages at scale quick
PRETRAINED = variants()["semaim"][1].configs["pretrain"]["quick"]
SEMAIM = title_of(load_config(ROOT / PRETRAINED).model)  #: as results name the quick scale's

spec = importlib.util.spec_from_file_location("reproduce", ROOT / "tools/reproduce.py")
reproduce = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reproduce)


@pytest.fixture
def here(monkeypatch, capfd):
    """A function that runs the tool in this process, which is sooner; exit status, output, error."""

    def call(*arguments):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *map(str, arguments)])
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        capfd.readouterr()
        return reproduce.run(reproduce.main), *capfd.readouterr()

    return call


def refused(done, *messages):
    """A failure as users see it."""
    status, output, error = done
    assert status == 2 and all(message in error for message in messages), error
    assert len(error.strip().splitlines()) == 1 and "tools/t" not in output


def commands(output):
    """The command lines of the stages, in words, without their environment."""
    rows = [row for row in output.splitlines() if " tools/t" in row or "semaim.data.scenes" in row]
    return [[word for word in shlex.split(row) if not re.match(r"[A-Z_]+=", word)] for row in rows]


def command(work, scenes, *stages):
    """A start of the tool on scenes that are there already."""
    line = [sys.executable, ROOT / "tools/reproduce.py", *QUICK, "--methods", "semaim", "--work-dir", work]
    return [*map(str, line), "--scenes", str(scenes), "--only", *stages]


def children(process):
    """Numbers of the processes that a process has started, in any of its threads."""
    lists = Path(f"/proc/{process}/task").glob("*/children")
    return [int(number) for path in lists for number in path.read_text().split()]


def kill(parent):
    """End a tool and its stages at once."""
    for group in (*children(parent.pid), parent.pid):
        with suppress(ProcessLookupError):  # the stage ends with the tool
            os.killpg(group, signal.SIGKILL)
    parent.stdout.read()  # until all who hold the pipe are gone, loader workers too


@contextmanager
def started(line):
    """A tool in a session of its own; killed where the test fails."""
    with subprocess.Popen(line, **PIPES, start_new_session=True) as parent:
        try:
            yield parent
        except BaseException:
            kill(parent)
            raise


def cells(work):
    """Rows of the table that hold a figure of ours."""
    return [row for row in csv.DictReader((work / "table.csv").open()) if row["ours"]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All stages of SemAIM on 130 scenes, then k-NN of the untrained encoder: the folder, and what was printed."""
    pytest.importorskip("mmdet", reason="mmdet is not installed: runs after tools/setup.sh --extras all")
    pytest.importorskip("mmseg", reason="mmsegmentation is not installed: runs after tools/setup.sh --extras all")
    work = tmp_path_factory.mktemp("reproduce")
    printed = []
    for more in (["--methods", "semaim"], ["--methods", "semaim", "scratch", "--only", "knn"]):
        done = tool("reproduce.py", *QUICK, "--work-dir", work, *more)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        printed.append(done.stdout)
    return work, printed


# From images to the table.


@pytest.mark.slow
def test_every_stage_runs_and_every_cell_is_a_measured_figure(whole):
    work, printed = whole
    folders = [work / "semaim/seed0" / name for name in MADE[1:]]
    folders.append(work / "scratch/seed0/knn")
    files = {str(folder): results(folder) for folder in folders}
    rows = cells(work)
    expected = [
        (folder, metric.label, metric.factor * file["metrics"][name])
        for folder, file in files.items()
        for name, (_, metric) in reported(file["metrics"]).items()
        if file["metrics"][name] >= 0
    ]
    assert len(expected) >= 9 and len(rows) == len(expected)
    for folder, metric, value in expected:
        (row,) = [row for row in rows if (row["folder"], row["metric"]) == (folder, metric)]
        assert float(row["ours"]) == pytest.approx(value) and (row["n"], row["published"]) == ("1", "")
        file = files[folder]
        assert (
            row["method"]
            == (SEMAIM if "/semaim/" in folder else "random weights")
            == (file["method"] or "random weights")
        )
        assert row["backbone"] == file["backbone"] == "ViT, 4 blocks of 128 channels"
        assert row["task"] == file["task"] and row["config"] == file["config"]
        assert row["pretraining_epochs"] == ("4" if "/semaim/" in folder else "none")
        labels = 10 * len(LEVELS["easy"].classes) if folder.endswith("finetune") else 104  # a fifth is to validate
        assert (row["training_images"], row["validation_images"], row["seed"]) == (str(labels), "26", "0")
        assert row["commit"] == (file["commit"] or "unknown") and row["hardware"] == file["device"]
        assert f"reduced: {labels} images" in row["remark"]
    text = (work / "table.md").read_text()
    page = (work / "table.html").read_text(encoding="utf-8")
    assert "84.1" in text and "<table" in page and "charset" in page and "\\toprule" in (work / "table.tex").read_text()
    shown = printed[1][printed[1].index("| Method") :]  # ours alone, at the end, then at a glance
    every, gains, glance = shown.split("\n| Method")
    glance, _, gained = glance.partition("\n\n| Gain")
    assert gains.count("\n| ") == 2 and "random weights" in gains and gained.count("\n| ") == 2, "k-NN alone has both"
    assert every.count("\n| ") == 1 + len(rows) and "84.1" not in shown and "table.html" in shown
    assert glance.count("\n| ") == 3 and all(f" {float(row['ours']):.2f} " in glance for row in rows)


@pytest.mark.slow
def test_the_report_opens_with_what_pretraining_changed(whole):
    work, printed = whole
    report = (work / "report.html").read_text(encoding="utf-8")
    opening = report[report.index('<section id="short"') : report.index('<section id="results"')]
    right = {name: results(work / name / "seed0/knn")["metrics"]["knn20_top1"] for name in ("semaim", "scratch")}
    assert f"{right['semaim'] - right['scratch']:+.1f} (95 %: " in opening
    level = json.loads((work / "scenes/scenes.json").read_text()).get("level", "normal")
    assert f"drawn scenes at level {level}, " in opening
    assert opening.count("<img ") == 1, "of the encoder that stands beside random weights in k-NN alone"
    rows = json.loads((work / "semaim/seed0/pretrain/centres.json").read_text())["rows"]
    (used,) = [row for row in rows if row["used"] and row["checkpoint"]]
    assert f"in {100 * used['on_object']:.0f} % of 26 validation scenes" in opening
    for stage, file in (
        ("pretrain", "orders.png"),
        ("detection", "predictions.png"),
        ("segmentation", "predictions.png"),
    ):
        assert (work / "semaim/seed0" / stage / file).is_file()
    assert "tools/visualize.py order" in printed[0] and "visualize" not in printed[1], "made once"


@pytest.mark.slow
def test_results_tell_where_weights_and_code_came_from(whole):
    work, _ = whole
    tuned = results(work / "semaim/seed0/finetune")
    assert (tuned["method"], tuned["pretrain_epochs"], tuned["pretrain_images"]) == (SEMAIM, 4, 80)
    assert (tuned["epochs"], tuned["cfg_options"]["train_cfg.max_epochs"]) == (2, 2)
    assert tuned["pretrain_options"]["train_cfg.max_epochs"] == 4
    assert tuned["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", tuned["commit"])
    assert results(work / "semaim/seed0/detection")["iterations"] == 2
    scratch = results(work / "scratch/seed0/knn")
    assert scratch["method"] is scratch["checkpoint"] is None and scratch["cfg_options"] == {} and scratch["seed"] == 0
    # A measured checkpoint of a stage tells how it was trained; one that is started from is of another method.
    path = work / "semaim/seed0/finetune/latest.pth"
    measured = origin_of(path, same=True, trained=True)
    assert (measured["method"], measured["epochs"], measured["cfg_options"]) == (SEMAIM, 2, tuned["cfg_options"])
    assert origin_of(path)["method"] == f"{SEMAIM} after fine-tuning" and origin_of(path)["pretrain_images"] == 80
    detector = origin_of(work / "semaim/seed0/detection/latest.pth", same=True, trained=True)
    assert (detector["iterations"], detector["pretrain_epochs"]) == (2, 4)


@pytest.mark.slow
def test_stages_are_printed_as_typed_and_skip_themselves(whole, here):
    work, (first, second) = whole
    lines = commands(first)
    names = [words[words.index("--work-dir") + 1].rsplit("/", 1)[1] for words in lines[1:]]
    assert lines[0][1:3] == ["-m", "semaim.data.scenes"] and names == MADE
    for words in lines[2:]:
        assert str(work / "semaim/seed0/pretrain/epoch_4.pth") in words
    assert "val_interval=" not in shlex.join(lines[1]) and "train_cfg.val_interval=2" in lines[4]
    assert len(commands(second)) == 1 and second.count("has finished") == 2  # the scenes, and one of the two k-NN
    status, output, error = here(*QUICK, "--work-dir", work, "--methods", "semaim")
    assert status == 0 and output.count("has finished") == 7 and not commands(output), error
    assert "| Method" in output


def until(pattern, rows, seen):
    """Read a running tool's lines, keeping them, to the first with the pattern."""
    for row in rows:
        seen.append(row)
        if re.search(pattern, row):
            return
    pytest.fail(f"no {pattern!r} in:\n" + "".join(seen[-30:]))


@pytest.mark.slow
def test_cut_by_kills_and_an_interrupt_and_with_two_at_a_time_figures_stay_the_same(whole, tmp_path):
    reference, _ = whole
    line, two = command(tmp_path, reference / "scenes", *MADE), ["--jobs", "2"]
    own, seen = tmp_path / "semaim/seed0", []
    for picture in ("pretrain/centres.json", "detection/predictions.png", "segmentation/predictions.png"):
        (own / picture).parent.mkdir(parents=True)
        shutil.copy(reference / "semaim/seed0" / picture, own / picture)  # to be sooner

    with started(line) as parent:
        until(r"saved .*epoch_\d+\.pth", parent.stdout, seen)
        kill(parent)
    assert any("semaim/seed0/pretrain:\n" in row for row in seen) and not (own / "pretrain/epoch_4.pth").exists()

    # It goes on, then detector and segmentor begin together. Each is held where it has saved.
    seen.clear()
    with started([*line, *two]) as parent:
        held = {}
        while len(held) < 2:
            until(r"saved .*iter_\d+\.pth", parent.stdout, seen)
            name = re.match(r"\[semaim/seed0/(\w+)\] ", seen[-1])[1]
            running = {child: Path(f"/proc/{child}/cmdline").read_text() for child in children(parent.pid)}
            (held[name],) = [child for child, words in running.items() if f"{own}/{name}\0" in words]
            os.killpg(held[name], signal.SIGSTOP)
        parent.send_signal(signal.SIGINT)
        time.sleep(0.5)  # for the tool to pass it on
        for group in held.values():
            os.killpg(group, signal.SIGCONT)
        seen += parent.stdout
    assert parent.returncode == 130 and set(held) == {"detection", "segmentation"}
    assert sum("the same command continues from there" in row for row in seen) == 2
    for name in held:
        assert (own / name / "latest.pth").exists()  # one that was between two stops may have measured, too
        assert f"interrupted in semaim/seed0/{name}: the same command continues from there\n" in seen
    said = [row for row in seen if " INFO " in row or "saved " in row]
    assert all(re.match(r"\[semaim/seed0/(pretrain|detection|segmentation)\] ", row) for row in said), said
    assert any(row.startswith("[semaim/seed0/pretrain] ") and "resumed from" in row for row in said)
    assert (own / "pretrain/orders.png").exists() and not any((own / name).exists() for name in ("knn", "linear"))

    # Killed while it measures.
    seen.clear()
    with started([*line, *two]) as parent:
        until(r"\[semaim/seed0/linear\] .*INFO", parent.stdout, seen)
        kill(parent)
    assert not (own / "linear/results.json").exists() and not (tmp_path / "table.csv").exists()

    done = subprocess.run([*line, *two], **PIPES, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "semaim/seed0/detection: has finished" in done.stdout and "semaim/seed0/linear:\n" in done.stdout
    own = ("checkpoint", "folder", "date", "commit")
    rows, expected = (
        [{k: v for k, v in row.items() if k not in own} for row in cells(work) if "/semaim/" in row["folder"]]
        for work in (tmp_path, reference)
    )
    assert len(rows) == 9 and rows == expected


@pytest.mark.skipif(sys.platform != "linux", reason="no parent-death signal here: runs on Linux")
def test_a_killed_tool_takes_its_stage_along():
    child = "import time; print('ready', flush=True); time.sleep(100)"
    parent = f"import sys; from semaim.results.running import follow; follow([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, cwd=ROOT) as tool:
        assert tool.stdout.readline() == "ready\n"
        assert len(children(tool.pid)) == 1
        tool.kill()
        begun = time.monotonic()
        assert tool.stdout.read() == ""  # the end of the pipe: the child is gone too
    assert time.monotonic() - begun < 60


@pytest.mark.slow
def test_runs_of_several_seeds_are_one_cell(whole, tmp_path):
    for method in ("semaim", "scratch"):
        for seed, shift in ((0, 0.0), (1, 2.0)):
            raw = results(whole[0] / method / "seed0/knn")
            raw["metrics"] = {name: value + shift for name, value in raw["metrics"].items()}
            raw |= {"seed": seed, "cfg_options": {"seed": seed} if seed else {}}
            raw["checkpoint"] = raw["checkpoint"] and raw["checkpoint"].replace("seed0", f"seed{seed}")
            folder = tmp_path / method / f"seed{seed}/knn"
            folder.mkdir(parents=True)
            (folder / "results.json").write_text(json.dumps(raw))
    pipeline.tabulate(tmp_path, "quick")
    rows = cells(tmp_path)
    assert sorted(row["method"] for row in rows) == [SEMAIM, "random weights"]
    for row in rows:
        assert (row["n"], row["seed"]) == ("2", "0, 1") and float(row["std"]) == pytest.approx(2**0.5)


# The plan.


@pytest.mark.slow
def test_a_rate_is_taken_from_the_logs_of_an_earlier_run(whole, here):
    work, _ = whole
    status, output, _ = here(*QUICK, "--work-dir", work, "--methods", "semaim", "--only", "pretrain", "--dry-run")
    rows = [json.loads(row) for path in (work / "semaim/seed0/pretrain").glob("*/vis_data/scalars.json")
            for row in path.read_text().splitlines()]  # fmt: skip
    rates = sorted(row["images_per_second"] for row in rows)
    rate = (rates[(len(rates) - 1) // 2] + rates[len(rates) // 2]) / 2
    assert status == 0 and f"/ {rate:g} images/s (median logged in {work / 'semaim/seed0/pretrain'})" in output
    # As many checkpoints, and as large, as those that were written.
    files = list((work / "semaim/seed0/pretrain").glob("epoch_*.pth"))
    count, told = re.search(r"checkpoints: (\d+) x ([\d.]+) MB", output).groups()
    assert int(count) == len(files) >= 1
    assert float(told) * 1e6 == pytest.approx((work / "semaim/seed0/pretrain/epoch_4.pth").stat().st_size, rel=0.01)


def test_pictures_of_a_stage_are_made_once_and_a_failure_stops_nothing(tmp_path, monkeypatch, capsys):
    names = [f"{kind}/{number}.jpg" for kind in "abcd" for number in range(4)]
    for name in names:
        (tmp_path / "scenes/classes/val" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "scenes/classes/val" / name).touch()
    stages = {stage.title: stage for stage in plan("quick", tmp_path, ["semaim", "saim", "mae"])}
    (order, picture), (centres, line) = stages["semaim/seed0/pretrain"].drawings()
    assert picture[2] == "order" and picture[-1] == str(order) and order.name == "orders.png"
    scenes = tmp_path / "scenes"
    assert picture[4:-3] == [str(scenes / "classes/val" / name) for name in names[::2]], "eight, of every class"
    assert line[1:3] == ["-m", "semaim.benchmarks.centres"] and line[4:] == [
        "--scenes",
        str(scenes),
        "--out",
        str(centres),
    ]
    assert [file.name for file, _ in stages["saim/seed0/pretrain"].drawings()] == ["orders.png"]
    ((file, line),) = stages["mae/seed0/pretrain"].drawings()
    assert (file.name, line[2]) == ("reconstruction.png", "reconstruction")
    ((file, line),) = stages["semaim/seed0/detection"].drawings()
    assert file.name == "predictions.png" and "--score-thr" not in line
    assert stages["semaim/seed0/knn"].drawings() == []

    begun, pretraining = [], stages["semaim/seed0/pretrain"]
    pretraining.folder.mkdir(parents=True)
    pretraining.result.touch()
    monkeypatch.setattr(Children, "follow", lambda self, line, *more: begun.append(line) or 2)
    assert pipeline.carry_out(pretraining, Children(), 1) == 0 and len(begun) == 2
    assert "orders.png could not be made" in capsys.readouterr().err
    order.touch()
    assert pipeline.carry_out(pretraining, Children(), 1) == 0 and len(begun) == 3


@pytest.mark.slow
def test_changed_settings_are_refused(whole, here):
    work, _ = whole
    start = ["--scale", "quick", "--work-dir", work, "--methods", "semaim", "--length"]
    longer = [word.replace("pretrain=4", "pretrain=9") for word in SMALL]
    refused(here(*start, *longer), "train_cfg.max_epochs = 4, now it is 9: choose another --work-dir")
    more = [word.replace("images=130", "images=150") for word in SMALL]
    refused(here(*start, *more), "was drawn with images = 130, now it is 150")
