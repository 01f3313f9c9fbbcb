"""Stages as data: their commands, costs, methods, settings and errors, without running any."""

import re
import subprocess
from pathlib import Path

import pytest
from commands import ROOT, tool
from test_reproduce import STAGES, VARIANTS, commands, here, refused, reproduce  # noqa: F401

from semaim.engine.config import load_config
from semaim.engine.results import backbone_of, commit, title_of
from semaim.errors import UserError
from semaim.methods.semaim import TITLES
from semaim.registry import task_of
from semaim.results.costs import checkpoints_kept, parse_rates, sizes_of, totals
from semaim.results.stages import SCALES, lengths_of, plan, split


def test_the_paper_names_every_command_and_what_it_costs(here):
    pytest.importorskip("mmdet", reason="mmdet is not installed: runs after tools/setup.sh --extras all")
    rates = ["--rate", "pretrain=1000", "mae/pretrain=4000", "--rate", "detection=50"]
    status, output, error = here("--scale", "paper", "--gpus", 8, "--nodes", 4, "--dry-run", *rates)
    assert status == 0, error
    lines = commands(output)
    assert len(lines) == 5 * 7 - 1 and output.count("NNODES=4 NODE_RANK=$NODE_RANK MASTER_ADDR=$MASTER_ADDR") == 24
    for words in lines:
        assert (ROOT / words[2]).is_file() and words[words.index("--gpus") + 1] == "8"
    assert "1,281,167 images x 800 epochs = 1,024,933,600 images; / 1000 images/s (--rate) / 3600 = 284.70" in output
    assert "284.70 GPU-hours, 8.90 h on 32 GPUs" in output
    assert "x 1,600 epochs = 2,049,867,200 images; / 4000 images/s (--rate) / 3600 = 142.35 GPU-hours" in output
    assert "64 images x 184,375 steps = 11,800,000 images; / 50 images/s (--rate) / 3600 = 65.56 GPU-hours" in output
    assert "16 images x 160,000 steps = 2,560,000 images; rate unknown: give --rate segmentation=N" in output
    assert "1,331,167 images once; rate unknown: give --rate knn=N; features: 2.0 GB" in output
    # 3 x 284.70 + 142.35 + 5 x 65.56
    assert "total: 1,324.24 GPU-hours without knn, linear, attentive, finetune, segmentation, of unknown rate" in output
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


@pytest.mark.parametrize("scale", SCALES)
def test_every_config_builds(scale):
    pytest.importorskip("mmdet", reason="mmdet is not installed: runs after tools/setup.sh --extras all")
    pytest.importorskip("mmseg", reason="mmsegmentation is not installed: runs after tools/setup.sh --extras all")
    roots = {"images": Path("i"), "coco": Path("c"), "ade": Path("a")}
    stages = plan(scale, Path("w"), VARIANTS, roots=roots)
    names = [name for name in STAGES if (scale, name) != ("quick", "attentive")]
    assert [stage.name for stage in stages if stage.method == "mae"] == names
    widths = {sizes_of(stage.config)[2] for stage in stages if stage.method}
    assert widths == {{"quick": 128, "study": 128, "paper": 768}[scale]}  # one encoder all along
    assert [stage.title for stage in stages if stage.needs is None and stage.name not in ("scenes", "pretrain")] == [
        f"scratch/seed0/{name}" for name in names[1:]
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
        f"semaim/seed{seed}/{name}"
        for seed in (0, 2)
        for name in ("pretrain", "knn", "linear", "attentive", "finetune")
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


def test_a_batch_is_split_evenly_over_as_many_as_can():
    assert split(2048, 8, 4) == (8, 4) and split(16, 8, 4) == (8, 2) and split(64, 8, 3) == (8, 2)
    assert split(16, 32, 1) == (16, 1) and split(8, 3, 2) == (2, 1)


def test_few_checkpoints_are_kept():
    cfg = load_config(ROOT / "semaim/configs/pretrain/semaim_vit_base_800e.py")  # every 20 epochs, the newest 3
    assert [checkpoints_kept(cfg, length) for length in (1, 20, 21, 800)] == [1, 1, 2, 3]
    assert totals([]) == "total: GPU-hours unknown; 0.0 MB of disk; validation is not counted"


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


def test_rates_and_lengths():
    assert parse_rates(["pretrain=1e3", "mae/pretrain=2.5"]) == {"pretrain": 1000.0, "mae/pretrain": 2.5}
    assert lengths_of("paper", {"linear": 3}) == {"linear": 3} and lengths_of("quick")["images"] == 2500
    with pytest.raises(UserError, match="no length of scale quick"):
        lengths_of("quick", {"linear": 3})
