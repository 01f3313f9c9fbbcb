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
from semaim.engine.results import backbone_of, commit, origin_of, title_of
from semaim.errors import UserError
from semaim.methods.semaim import TITLES
from semaim.registry import task_of, variants
from semaim.results import pipeline
from semaim.results.costs import checkpoints_kept, parse_rates, sizes_of, totals
from semaim.results.running import Children
from semaim.results.runs import reported
from semaim.results.stages import SCALES, lengths_of, plan, split, stage_names

ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": ENV, "cwd": ROOT}
SMALL = ["images=130", "unlabelled=80", "size=32", "pretrain=4", "finetune=2", "detection=2", "segmentation=2"]
QUICK = ["--scale", "quick", "--length", *SMALL]
VARIANTS, STAGES = list(variants()), stage_names()
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


def test_every_stage_runs_and_every_cell_is_a_measured_figure(whole):
    work, printed = whole
    folders = [work / "semaim/seed0" / name for name in STAGES[1:]] + [work / "scratch/seed0/knn"]
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
    every, glance = shown.split("\n| Method")
    assert every.count("\n| ") == 1 + len(rows) and "84.1" not in shown and "table.html" in shown
    assert glance.count("\n| ") == 3 and all(f" {float(row['ours']):.2f} " in glance for row in rows)


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


def test_stages_are_printed_as_typed_and_skip_themselves(whole, here):
    work, (first, second) = whole
    lines = commands(first)
    names = [words[words.index("--work-dir") + 1].rsplit("/", 1)[1] for words in lines[1:]]
    assert lines[0][1:3] == ["-m", "semaim.data.scenes"] and names == STAGES
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


def test_cut_by_kills_and_an_interrupt_and_with_two_at_a_time_figures_stay_the_same(whole, tmp_path):
    reference, _ = whole
    line, two = command(tmp_path, reference / "scenes", *STAGES), ["--jobs", "2"]
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
    assert sum("the same command goes on from there" in row for row in seen) == 2
    for name in held:
        assert (own / name / "latest.pth").exists()  # one that was between two stops may have measured, too
        assert f"interrupted in semaim/seed0/{name}: the same command goes on from there\n" in seen
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


def test_an_interrupt_and_a_failure_say_where(tmp_path, here, monkeypatch):
    monkeypatch.setattr(Children, "follow", lambda self, line, *more: self.stop(signal.SIGINT) or 130)
    status, output, error = here(*QUICK, "--work-dir", tmp_path)
    assert status == 130 and len(commands(output)) == 1
    assert error == "interrupted in scenes: the same command goes on from there\n"
    monkeypatch.setattr(Children, "follow", lambda self, line, *more: 0)  # and leaves nothing behind
    assert here(*QUICK, "--work-dir", tmp_path)[0] == 1


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


def test_the_paper_names_every_command_and_what_it_costs(here):
    pytest.importorskip("mmdet", reason="mmdet is not installed: runs after tools/setup.sh --extras all")
    rates = ["--rate", "pretrain=1000", "mae/pretrain=4000", "--rate", "detection=50"]
    status, output, error = here("--scale", "paper", "--gpus", 8, "--nodes", 4, "--dry-run", *rates)
    assert status == 0, error
    lines = commands(output)
    assert len(lines) == 5 * 6 - 1 and output.count("NNODES=4 NODE_RANK=$NODE_RANK MASTER_ADDR=$MASTER_ADDR") == 19
    for words in lines:
        assert (ROOT / words[2]).is_file() and words[words.index("--gpus") + 1] == "8"
    assert "1,281,167 images x 800 epochs = 1,024,933,600 images; / 1000 images/s (--rate) / 3600 = 284.70" in output
    assert "284.70 GPU-hours, 8.90 h on 32 GPUs" in output
    assert "x 1,600 epochs = 2,049,867,200 images; / 4000 images/s (--rate) / 3600 = 142.35 GPU-hours" in output
    assert "64 images x 184,375 steps = 11,800,000 images; / 50 images/s (--rate) / 3600 = 65.56 GPU-hours" in output
    assert "16 images x 160,000 steps = 2,560,000 images; rate unknown: give --rate segmentation=N" in output
    assert "1,331,167 images once; rate unknown: give --rate knn=N; features: 2.0 GB" in output
    # 3 x 284.70 + 142.35 + 5 x 65.56
    assert "total: 1,324.24 GPU-hours without knn, linear, finetune, segmentation, of unknown rate" in output
    assert "NNODES=2" in output  # 16 images are split over 16 GPUs at most


@pytest.mark.parametrize("scale", SCALES)
def test_costs_are_told_by_a_tool_that_has_trained_nothing(scale, tmp_path):
    """In a process of its own: here other tests have imported what a config names."""
    if scale == "quick":
        pytest.importorskip("mmdet", reason="mmdet is not installed: runs after tools/setup.sh --extras all")
        pytest.importorskip("mmseg", reason="mmsegmentation is not installed: runs after tools/setup.sh --extras all")
        more, stages = [], 1 + 6 + 5
    else:
        more, stages = ["--methods", "semaim", "mae", "--only", "pretrain", "knn"], 4
    more += ["--cifar", tmp_path] if scale == "study" else []
    done = tool("reproduce.py", "--scale", scale, "--dry-run", "--work-dir", tmp_path / "work", *more)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert len(commands(done.stdout)) == stages and f"# stage {stages} of {stages}, " in done.stdout
    assert done.stdout.count("checkpoints: ") + done.stdout.count("features: ") == stages - (scale == "quick")
    assert re.search(r"# total: .* of disk", done.stdout) and not (tmp_path / "work").exists()


def test_without_a_rate_no_time_is_told(here):
    status, output, _ = here("--scale", "paper", "--dry-run", "--methods", "semaim", "--only", "pretrain", "knn")
    assert status == 0 and "total: GPU-hours unknown; " in output and not re.search(r"\d GPU-hours| h on ", output)
    assert output.count("rate unknown") == 2 and "NNODES" not in output


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


@pytest.mark.parametrize("scale", SCALES)
def test_every_config_builds(scale):
    pytest.importorskip("mmdet", reason="mmdet is not installed: runs after tools/setup.sh --extras all")
    pytest.importorskip("mmseg", reason="mmsegmentation is not installed: runs after tools/setup.sh --extras all")
    roots = {"images": Path("i"), "coco": Path("c"), "ade": Path("a")}
    stages = plan(scale, Path("w"), VARIANTS, roots=roots)
    assert [stage.name for stage in stages if stage.method == "mae"] == STAGES
    widths = {sizes_of(stage.config)[2] for stage in stages if stage.method}
    assert widths == {{"quick": 128, "study": 128, "paper": 768}[scale]}  # one encoder all along
    assert [stage.title for stage in stages if stage.needs is None and stage.name not in ("scenes", "pretrain")] == [
        f"scratch/seed0/{name}" for name in STAGES[1:]
    ]


def test_methods_differ_by_what_makes_them():
    for scale in SCALES:
        stages = plan(scale, Path("w"), VARIANTS, roots={"images": Path("i")})
        for stage in stages:
            if stage.name == "pretrain":
                cfg = load_config(ROOT / stage.config, stage.options)
                order, *target = stage.method.split("-")
                named = {"semaim": "SemAIM", "saim": "SAIM", "raster": "raster order", "mae": "MAE", "simmim": "SimMIM"}
                named = named.get(order, f"order {order}") + ", EMA features" * (target == ["ema"])
                centre = cfg.model.network.get("similarity", "cls")
                named += f", similarity {centre}" * (centre != "cls" and order not in ("mae", "simmim"))
                assert title_of(cfg.model) == named and task_of(cfg).pretrains


def test_seeds_lengths_and_data_reach_the_commands():
    roots = {"images": Path("/d/cifar")}
    stages = plan("study", Path("w"), ["semaim"], [0, 2], roots, {"pretrain": 10}, (50_000, 10_000))
    assert [stage.title for stage in stages] == [
        f"semaim/seed{seed}/{name}" for seed in (0, 2) for name in ("pretrain", "knn", "linear", "finetune")
    ]
    first, *_, last = stages
    assert first.options["train_cfg.max_epochs"] == 10
    assert not any(key.startswith("param_scheduler") for key in first.options), "shares of the run stay"
    assert "seed" not in first.options and last.options["seed"] == 2 and first.images == 50_000
    assert last.pretrained == Path("w/semaim/seed2/pretrain/epoch_10.pth") and last.needs == "semaim/seed2/pretrain"
    assert stages[1].images == 60_000 and stages[1].length is None
    assert ["--data-root", "/d/cifar"] == first.command()[first.command().index("--data-root") :][:2]
    (paper, *_) = plan("paper", Path("w"), ["semaim"])
    assert paper.options == {} and "--cfg-options" not in paper.command() and "--data-root" not in paper.command()


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


def test_a_batch_is_split_evenly_over_as_many_as_can():
    assert split(2048, 8, 4) == (8, 4) and split(16, 8, 4) == (8, 2) and split(64, 8, 3) == (8, 2)
    assert split(16, 32, 1) == (16, 1) and split(8, 3, 2) == (2, 1)


def test_few_checkpoints_are_kept():
    cfg = load_config(ROOT / "semaim/configs/pretrain/semaim_vit_base_800e.py")  # every 20 epochs, the newest 3
    assert [checkpoints_kept(cfg, length) for length in (1, 20, 21, 800)] == [1, 1, 2, 3]
    assert totals([]) == "total: GPU-hours unknown; 0.0 MB of disk; validation is not counted"


# Methods, backbones and code, as results.json names them.

CLIP = {"name": "vit_b_clip_quickgelu_224.openai", "normalisation": "student"}


@pytest.mark.parametrize(
    ("changed", "method"),
    [
        *(({"order": order}, method) for order, method in TITLES.items()),
        ({"order": "snake"}, "order snake"),
        ({"guide": "ema", "target": {"type": "FeatureTarget"}}, "SemAIM, EMA features"),
        ({"guide": CLIP, "target": {"type": "FeatureTarget"}}, "SemAIM*"),
        ({"guide": CLIP | {"normalisation": "teacher"}, "target": {"type": "FeatureTarget"}}, "SemAIM, CLIP features"),
        ({"guide": {"name": "vit_b_clip_224.openai"}, "target": {"type": "FeatureTarget"}}, "SemAIM, CLIP features"),
        ({"guide": {"name": "vit_b_224.dino"}, "target": {"type": "FeatureTarget"}}, "SemAIM, DINO features"),
        ({"guide": "ema", "similarity": "gap"}, "SemAIM, guide EMA, similarity gap"),
        ({"type": "MAE"}, "MAE"),
        ({"type": 5}, None),
    ],
)
def test_methods_are_told_by_their_config(changed, method):
    assert title_of({"network": {"type": "SemAIM", **changed}}) == method


def test_backbones_are_told_by_their_sizes():
    for size, name in (("base", "ViT-B"), ("tiny", "ViT-T")):
        assert backbone_of({"model": {"network": {"type": "Classifier", "size": size}}}) == name
    assert backbone_of({"model": {"backbone": {"type": "ViTDet", "patch_size": 8}}}) == "ViT-B/8"
    module = {"type": "EncoderDecoder", "backbone": {"type": "SegmentationViT", "depth": 4}}
    assert backbone_of({"model": {"type": "SegTTAModel", "module": module}}) == "ViT, 4 blocks of 768 channels"
    assert backbone_of({"model": {"backbone": {"type": "ResNet"}}}) is None and backbone_of({}) is None


def test_commits_of_a_checkout_alone(tmp_path, monkeypatch):
    import semaim.engine.results as module

    monkeypatch.setattr(module, "ROOT", tmp_path)
    assert commit() is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "semaim").mkdir()
    (tmp_path / "semaim/a.py").write_text("1")
    for line in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run([*git, *line], check=True)
    clean = commit()
    assert re.fullmatch("[0-9a-f]{40}", clean)
    (tmp_path / "notes.txt").write_text("no code")
    assert commit() == clean
    (tmp_path / "semaim/b.py").write_text("2")
    assert commit() == f"{clean}+changes"
    monkeypatch.setattr(module, "ROOT", tmp_path / "semaim")  # inside another project
    assert commit() is None


# What is wrong is said before anything starts.


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
        (["--scale", "quick", "--gpus", "x"], "'x' GPUs asked for"),
        (["--scale", "quick", "--only", "knn", "--skip", "knn"], "no stage is left"),
        (["--scale", "quick", "--only", "knn"], "semaim/seed0/knn needs"),
    ],
)
def test_errors(arguments, message, tmp_path, here):
    refused(here("--work-dir", tmp_path / "work", *arguments), message)
    assert not (tmp_path / "work").exists()


def test_changed_settings_are_refused(whole, here):
    work, _ = whole
    start = ["--scale", "quick", "--work-dir", work, "--methods", "semaim", "--length"]
    longer = [word.replace("pretrain=4", "pretrain=9") for word in SMALL]
    refused(here(*start, *longer), "train_cfg.max_epochs = 4, now it is 9: choose another --work-dir")
    more = [word.replace("images=130", "images=150") for word in SMALL]
    refused(here(*start, *more), "was drawn with images = 130, now it is 150")


def test_runs_of_other_origin_are_left_alone(tmp_path, here):
    (tmp_path / "semaim/seed0/knn").mkdir(parents=True)
    (tmp_path / "semaim/seed0/knn/results.json").write_text('{"metrics": {}}')
    refused(here(*QUICK, "--work-dir", tmp_path), "semaim/seed0/knn holds a run of other origin")


def test_a_failed_stage_stops_with_its_status(tmp_path, here):
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes/notes.txt").write_text("not mine")
    status, output, error = here(*QUICK, "--work-dir", tmp_path)
    assert status == 2 and len(commands(output)) == 1
    assert error.strip().splitlines()[-1] == "scenes failed with exit status 2; what has finished stays"


def test_rates_and_lengths():
    assert parse_rates(["pretrain=1e3", "mae/pretrain=2.5"]) == {"pretrain": 1000.0, "mae/pretrain": 2.5}
    assert lengths_of("paper", {"linear": 3}) == {"linear": 3} and lengths_of("quick")["images"] == 2500
    with pytest.raises(UserError, match="no length of scale quick"):
        lengths_of("quick", {"linear": 3})
