"""Benchmarks beside the references' own code: equal weights give equal results, and what is missing is one line."""

import os
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from commands import one_line, tool
from test_benchmark import rows_of

from semaim.benchmarks import backbones, measuring, pretraining, references
from semaim.errors import UserError
from semaim.models.vit import SIZES


def clone(name):
    """A folder of $SEMAIM_REFERENCES, which holds clones as semaim/ and detectron2/."""
    folder = Path(os.environ.get("SEMAIM_REFERENCES", ""), name)
    if "SEMAIM_REFERENCES" not in os.environ or not folder.is_dir():
        pytest.skip(f"no clone of {name}: runs where SEMAIM_REFERENCES names the folder that holds it as {name}/")
    return str(folder)


@pytest.fixture
def shallow(monkeypatch):
    """The smallest encoder with two blocks."""
    monkeypatch.setitem(SIZES, "tiny", {**SIZES["tiny"], "depth": 2})


@pytest.mark.parametrize("order", ["semantic", "raster"])
def test_the_official_code_has_our_loss_and_gradients(order):
    folder, before = clone("semaim"), set(sys.modules)
    setting = pretraining.Setting("tiny", batch=2, depth=2, order=order)
    model, images, draw = setting.build()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    difference = pretraining.check_parity(model, images, draw, folder)
    assert difference["loss"] < 1e-5 and 0 < difference["gradients"] < 1e-3
    assert not {name for name in set(sys.modules) - before if name.split(".")[0] in ("models", "util", "engines")}
    model.query_blocks[0].attn.k.weight.data += 0.1
    official = references.official_model(folder, model)
    official.blocks[0].attn.qkv.weight.data += 0.1
    with patch.object(pretraining, "official_model", lambda *_: official):
        with pytest.raises(UserError, match="losses of ours and of the official code differ by .* not timed"):
            pretraining.check_parity(model, images, draw, folder)


@pytest.mark.parametrize("order", ["semantic", "raster"])
def test_the_official_step_trains_as_the_explicit_masks_do(order):
    setting = pretraining.Setting("tiny", batch=2, depth=2, order=order, reference=clone("semaim"))
    draw = torch.stack([torch.randperm(196) for _ in range(2)]) / 196
    with patch.object(pretraining.Setting, "build", lambda self, build=setting.build: (*build()[:2], draw)):
        baseline = pretraining.build_step("baseline", setting)
        official = pretraining.build_step("official", setting)
    with patch.object(torch, "rand", lambda *size, **kwargs: draw.clone()):
        losses = [(baseline(), official()["loss"]) for _ in range(3)]
    assert [a for a, _ in losses] == pytest.approx([b for _, b in losses], rel=1e-5)
    assert losses[2][1] < losses[0][1]


@pytest.mark.parametrize("kind", ["detectron2", "mmseg"])
def test_backbones_have_our_maps_and_gradients(kind, shallow):
    if kind == "mmseg":
        pytest.importorskip("mmseg", reason="mmseg is not installed: runs after tools/setup.sh --extras all")
    pair = backbones.build_pair(kind, "tiny", 64, clone(kind) if kind == "detectron2" else None)
    assert all(parameter.any() for parameter in pair.ours.parameters())
    images = torch.randn(2, 3, 64, 64)
    assert 0 < backbones.check_parity(pair, images) < 1e-4
    next(p for name, p in pair.ours.named_parameters() if "rel" in name).data *= -1
    with pytest.raises(UserError, match="maps of ours and of the reference differ by .* not timed"):
        backbones.check_parity(pair, images)


@pytest.mark.parametrize("command", ["pretrain", "vitdet"])
def test_clones_are_measured(command, shallow, monkeypatch):
    folder = clone("semaim" if command == "pretrain" else "detectron2")
    monkeypatch.setattr(pretraining, "cpu_peak", lambda *_: 1e6)
    monkeypatch.setattr(backbones, "cpu_peak", lambda *_: 1e6)
    if command == "pretrain":
        rows = pretraining.pretrain(pretraining.Setting("tiny", batch=1, depth=1, reference=folder), repeats=1)
        titles = ["the same, against the official code", "explicit masks, against the official code"]
    else:
        rows = backbones.backbone("detectron2", "tiny", 64, 1, "cpu", "fp32", 1, folder)
        titles = ["ViTDet's encoder and pyramid against detectron2's, ViT-tiny 64 px, forward + backward"]
    found = {row.what: row for row in rows if row.where == "CPU"}
    assert all(found[title].ours > 0 and found[title].ratio > 0 for title in titles)


def test_the_order_pass_in_full_precision_is_a_row_of_its_own(monkeypatch):
    monkeypatch.setattr(pretraining, "cpu_peak", lambda *_: 1e6)
    setting = pretraining.Setting("tiny", batch=1, img_size=32, depth=1, precision="bf16")
    rows = {row.what: row for row in pretraining.pretrain(setting, repeats=1)}
    assert rows["the same, order pass in fp32"].ratio > 0
    looked = []
    with patch.object(pretraining, "our_step", lambda model, *_: looked.append(model.look_precision)):
        for variant in ("ours", "ours, order in fp32"):
            pretraining.build_step(variant, setting)
    assert looked == ["same", "fp32"]


def test_turns_of_several_variants_are_reversed(monkeypatch):
    calls, times = [], iter([1.0, 2.0, 3.0, 6.0, 5.0, 4.0])
    monkeypatch.setattr(measuring, "seconds", lambda work, device, inner: (calls.append(work()), next(times))[1])
    turns = measuring.take_turns([lambda: "a", lambda: "b", lambda: "c"], torch.device("cpu"), repeats=2, warmup=0)
    assert calls == ["a", "b", "c", "c", "b", "a"] and turns == [(1, 2, 3), (4, 5, 6)]
    assert measuring.ratio_of(*list(zip(*turns, strict=True))[:2]) == (2.5, 3.5, 1.625, (1.25, 2.0))


@pytest.mark.slow
def test_the_tool_measures_mmsegs_backbone(tmp_path):
    pytest.importorskip("mmseg", reason="mmseg is not installed: runs after tools/setup.sh --extras all")
    out = tmp_path / "rows.json"
    done = tool("benchmark.py", "upernet", "--model", "tiny", "--img-size", 64, "--repeats", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    rows = rows_of(out, "upernet")
    assert rows[0]["what"].startswith("UperNet's encoder against mmseg's MAE, ViT-tiny 64 px")
    assert rows[0]["ratio"] > 0 and rows[1]["unit"] == "MB" and rows[1]["ours"] > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["pretrain", "--reference", "nowhere"], "--reference nowhere: there is no models/models_semaim.py in it"),
        (["vitdet", "--reference", "nowhere"], "there is no detectron2/modeling/backbone/vit.py in it: give a clone"),
        (["upernet", "--img-size", 100], "--img-size 100: give a multiple of 32"),
    ],
)
def test_what_is_missing_is_one_line(arguments, message):
    one_line(tool("benchmark.py", *arguments), message)


def test_settings_that_the_official_code_lacks_are_one_line(tmp_path):
    model, _, _ = pretraining.Setting("tiny", batch=1, img_size=64, depth=1).build()
    with pytest.raises(UserError, match="needs 14 x 14 patches or more"):
        references.official_model("anywhere", model)
    model.order = "centre"
    with pytest.raises(UserError, match="no order centre: choose from semantic, "):
        references.official_model("anywhere", model)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/models_semaim.py").write_text("import a_module_that_is_gone\n")
    with pytest.raises(UserError, match="cannot be imported here: No module named 'a_module_that_is_gone'"):
        references.load_semaim(str(tmp_path))
