"""Checkpoints of every dialect: read, loaded with a report, converted, exported - and never run."""

import argparse
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from semaim import checkpoint
from semaim.engine.checkpointing import read_checkpoint
from semaim.errors import UserError
from semaim.models import MAE, PixelTarget, SemAIM
from semaim.models.classifier import Classifier
from semaim.models.vit import VisionTransformer

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
HEAD = ("head", "fc_norm")


def random_state(model):
    """The state of a model, every float of it random."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn_like(tensor).abs())
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def states():
    """Weights of our models, by what they are."""
    torch.manual_seed(0)
    target = PixelTarget((8, 8), blur_kernel=0)
    return {
        "encoder": random_state(VisionTransformer(**SIZES)),
        "semaim": random_state(SemAIM(target, guide="ema", **SIZES)),
        "mae": random_state(MAE(target, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, **SIZES)),
        "tuned": random_state(Classifier(5, "avg", **SIZES)),
        "tuned_cls": random_state(Classifier(5, "cls", **SIZES)),
        "probe": random_state(Classifier(5, "cls", probe=True, **SIZES)),
    }


def mmpretrain(state):
    """mmpretrain's names, written out one by one."""
    renamed = {
        "backbone.cls_token": state["cls_token"],
        "backbone.pos_embed": state["pos_embed"],
        "backbone.patch_embed.projection.weight": state["patch_embed.proj.weight"],
        "backbone.patch_embed.projection.bias": state["patch_embed.proj.bias"],
        "backbone.ln1.weight": state["norm.weight"],
        "backbone.ln1.bias": state["norm.bias"],
    }
    for block in range(2):
        for theirs, ours in {
            "ln1": "norm1", "attn.qkv": "attn.qkv", "attn.proj": "attn.proj", "ln2": "norm2",
            "ffn.layers.0.0": "mlp.fc1", "ffn.layers.1": "mlp.fc2",
        }.items():  # fmt: skip
            for kind in ("weight", "bias"):
                renamed[f"backbone.layers.{block}.{theirs}.{kind}"] = state[f"blocks.{block}.{ours}.{kind}"]
    return renamed


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def write(folder, dialect, states):
    """A file of a dialect, and the weights that are to be found in it."""
    encoder, path = states["encoder"], folder / "file.pth"
    content = {
        "semaim": {"format": "semaim", "model": states["semaim"], "epoch": 3, "config": None},
        "semaim tuned": {"format": "semaim", "model": states["tuned"], "classes": list("abcde"), "config": None},
        "semaim probe": {"format": "semaim", "model": states["probe"], "config": None},
        "official": {"model": "aim_base", "state_dict": prefixed("module.", states["semaim"]), "epoch": 3,
                     "optimizer": {"state": {}}},
        "mae": {"model": states["mae"], "epoch": 3, "optimizer": {"state": {}}},
        "mae tuned": {"model": states["tuned"], "args": argparse.Namespace(lr=1), "epoch": 3},
        "timm": states["tuned_cls"],
        "dino": encoder,
        "dino full": {"student": prefixed("module.backbone.", encoder), "epoch": 3,
                      "teacher": {**prefixed("backbone.", encoder), "head.mlp.0.weight": torch.zeros(3, 3)}},
        "mmpretrain": {"meta": {"epoch": 3}, "state_dict": {**mmpretrain(encoder), "neck.mask_token": torch.zeros(3)}},
        "mmpretrain old": {"meta": {}, "state_dict": {n.replace("backbone.ln1", "backbone.norm1"): t
                                                      for n, t in mmpretrain(encoder).items()}},
        "mmpretrain bare": {n.removeprefix("backbone."): t for n, t in mmpretrain(encoder).items()},
        "detectron2": {"model": {**prefixed("backbone.net.", encoder), "backbone.simfp_2.0.weight": torch.zeros(3),
                                 "roi_heads.box_head.fc1.weight": torch.zeros(3)}, "iteration": 9},
        "segmentor": {"meta": {}, "state_dict": {**prefixed("backbone.", encoder), "decode_head.x": torch.zeros(3)}},
    }.get(dialect)  # fmt: skip
    found = {
        "semaim": {n: t for n, t in states["semaim"].items() if not n.startswith("ema.")},
        "semaim tuned": states["tuned"], "semaim probe": states["probe"], "mae": states["mae"],
        "mae tuned": states["tuned"], "timm": states["tuned_cls"], "timm safetensors": states["tuned_cls"],
    }.get(dialect, encoder)  # fmt: skip
    found = {n: t for n, t in states["semaim"].items() if not n.startswith("ema.")} if dialect == "official" else found
    if dialect == "timm safetensors":
        path = folder / "file.safetensors"
        save_file(states["tuned_cls"], path)
    elif dialect == "detectron2 pkl":
        path = folder / "file.pkl"
        arrays = {f"backbone.net.{name}": tensor.numpy() for name, tensor in encoder.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "x"}, protocol=2))
    else:
        torch.save(content, path)
    return path, found


DIALECTS = {
    "semaim": "semaim", "semaim tuned": "semaim", "semaim probe": "semaim", "official": "official SemAIM", "mae": "mae",
    "mae tuned": "mae", "timm": "timm", "timm safetensors": "timm", "dino": "timm", "dino full": "DINO",
    "mmpretrain": "mmpretrain", "mmpretrain old": "mmpretrain", "mmpretrain bare": "mmpretrain",
    "detectron2": "detectron2", "detectron2 pkl": "detectron2", "segmentor": "detector or segmentor",
}  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_read_and_loaded(dialect, states, tmp_path):
    path, expected = write(tmp_path, dialect, states)
    found = checkpoint.read(path)
    assert found.dialect == DIALECTS[dialect]
    assert found.state.keys() == expected.keys()
    assert all(torch.equal(found.state[name], expected[name]) for name in expected)
    assert found.sizes == {
        "embed_dim": 32, "depth": 2, "num_heads": 1, "patch_size": (8, 8), "img_size": (32, 32), "mlp_ratio": 4,
    }  # fmt: skip
    if dialect in ("semaim", "official", "mae", "mmpretrain", "mae tuned"):
        assert found.epoch == 3
    model = VisionTransformer(**SIZES)
    report = checkpoint.load(model, path)
    tuned = dialect in ("semaim tuned", "mae tuned")  # they pool the patches: no final norm
    assert report.missing == (["norm.weight", "norm.bias"] if tuned else [])
    assert len(report.matched) == (28 if tuned else 30) and not report.resized
    for name, tensor in model.state_dict().items():
        assert tuned and name.startswith("norm.") or torch.equal(tensor, expected[name]), name
    assert ("MISSING" in str(report)) == tuned
    if dialect == "semaim":
        assert "left in the file: query_blocks (" in str(report) and "ema (" in str(report)


@pytest.mark.parametrize("kind", ["tuned", "tuned_cls", "probe"])
def test_a_classifier_comes_back_whole_and_a_new_one_is_told(kind, states, tmp_path):
    torch.save({"format": "semaim", "model": states[kind], "config": None}, tmp_path / "x.pth")
    options = {"pool": "avg" if kind == "tuned" else "cls", "probe": kind == "probe", **SIZES}
    model = Classifier(5, **options)
    report = checkpoint.load(model, tmp_path / "x.pth")
    assert not report.missing and not report.new and not report.unexpected
    assert all(torch.equal(tensor, states[kind][name]) for name, tensor in model.state_dict().items())
    # Another number of classes: the head stays in the file, and the new one is expected or missing.
    last = "head.1" if kind == "probe" else "head"
    wider = Classifier(7, **options)
    report = checkpoint.load(wider, tmp_path / "x.pth", HEAD)
    assert report.new == [f"{last}.weight", f"{last}.bias"] and report.unexpected == report.new and not report.missing
    assert checkpoint.load(wider, tmp_path / "x.pth").missing == report.new


@pytest.mark.parametrize("to", checkpoint.DIALECTS)
@pytest.mark.parametrize("kind", ["encoder", "semaim", "mae", "tuned", "tuned_cls", "probe"])
def test_round_trips_are_bit_equal(kind, to, states, tmp_path):
    start, there, back = tmp_path / "a.pth", tmp_path / "b.pth", tmp_path / "c.pth"
    torch.save({"format": "semaim", "model": states[kind], "config": None, "epoch": 7}, start)
    left = checkpoint.convert(start, there, to)
    checkpoint.convert(there, back, "semaim")
    final = read_checkpoint(back)["model"]
    decoder = {"semaim": ("query_blocks", "prediction_head"), "mae": ("decoder_", "mask_token")}.get(kind, ())
    kept = to == "semaim" or (to == "mae" and kind == "mae")
    expected = {
        name: tensor
        for name, tensor in states[kind].items()
        if not name.startswith("ema.") and (kept or not name.startswith(decoder) or not decoder)
    }
    assert final.keys() == expected.keys()
    assert all(torch.equal(final[name], tensor) for name, tensor in expected.items())
    assert set(left) == states[kind].keys() - expected.keys()
    assert checkpoint.read(there).dialect == to
    if to in ("semaim", "mmpretrain"):
        assert checkpoint.read(there).epoch == 7


def test_mmpretrain_names_are_theirs(states, tmp_path):
    torch.save(states["encoder"], tmp_path / "x.pth")
    checkpoint.convert(tmp_path / "x.pth", tmp_path / "y.pth", "mmpretrain")
    written, expected = torch.load(tmp_path / "y.pth", weights_only=True)["state_dict"], mmpretrain(states["encoder"])
    assert written.keys() == expected.keys() and all(torch.equal(written[n], expected[n]) for n in expected)
    heads = {"tuned": "head.fc", "tuned_cls": "head.layers.head", "probe": "head.layers.head"}
    for kind, head in heads.items():
        torch.save(states[kind], tmp_path / "x.pth")
        checkpoint.convert(tmp_path / "x.pth", tmp_path / "y.pth", "mmpretrain")
        written = torch.load(tmp_path / "y.pth", weights_only=True)["state_dict"]
        ours = "head.1.weight" if kind == "probe" else "head.weight"
        assert torch.equal(written[f"{head}.weight"], states[kind][ours])
        assert ("neck.bn.running_mean" in written) == (kind == "probe") and ("backbone.ln2.bias" in written) == (
            kind == "tuned"
        )


# Against timm.


@pytest.mark.parametrize(("file_size", "size"), [(224, 224), (224, 384), (384, 224)])
def test_features_are_timms_for_the_same_weights(file_size, size, tmp_path):
    torch.manual_seed(0)
    options = {"patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3}
    source = timm.models.VisionTransformer(img_size=file_size, num_classes=0, **options)
    path = tmp_path / "timm.safetensors"
    save_file(source.state_dict(), path)
    theirs = timm.models.VisionTransformer(img_size=size, num_classes=0, **options).eval()
    timm.models.load_checkpoint(theirs, str(path), filter_fn=timm.models.vision_transformer.checkpoint_filter_fn)
    images = torch.randn(2, 3, size, size)
    token = Classifier(0, "cls", img_size=size, **options).eval()
    mean = Classifier(0, "avg", probe=True, img_size=size, **options).eval()
    report = checkpoint.load(token, path, HEAD)
    assert bool(report.resized) == (size != file_size)
    checkpoint.load(mean, path, HEAD)
    with torch.no_grad():
        tokens = theirs.forward_features(images)
        torch.testing.assert_close(token.features(images), tokens[:, 0], atol=1e-5, rtol=0)
        pooled = F.layer_norm(VisionTransformer.forward(token, images)[:, 1:], (48,)).mean(1)
        torch.testing.assert_close(pooled, F.layer_norm(tokens[:, 1:], (48,)).mean(1), atol=1e-5, rtol=0)
        theirs.norm = torch.nn.Identity()
        patches = theirs.forward_features(images)[:, 1:]
        torch.testing.assert_close(mean.features(images), patches.mean(dim=1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["encoder", "semaim", "tuned", "tuned_cls", "probe"])
def test_timm_opens_an_export(kind, states, tmp_path):
    state = {name: tensor * 0.1 for name, tensor in states[kind].items() if tensor.is_floating_point()}
    state |= {name: tensor for name, tensor in states[kind].items() if not tensor.is_floating_point()}
    config = {"model": {"network": {**SIZES}}}
    torch.save({"format": "semaim", "model": state, "config": config, "classes": list("abcde")}, tmp_path / "x.pth")
    checkpoint.export(tmp_path / "x.pth", tmp_path / "out")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    classes = 0 if kind in ("encoder", "semaim") else 5
    ours = Classifier(classes, "avg" if kind == "tuned" else "cls", probe=kind == "probe", **SIZES).eval()
    checkpoint.load(ours, tmp_path / "x.pth")
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        out = ours(images) if classes else ours.features(images)
        torch.testing.assert_close(theirs(images), out, atol=1e-4, rtol=1e-4)
    assert theirs.num_classes == classes and theirs.pretrained_cfg["input_size"] == [3, 32, 32] or (3, 32, 32)


def test_a_published_architecture_is_named_and_opens_at_another_size(tmp_path):
    torch.manual_seed(0)
    model = VisionTransformer("tiny", img_size=64)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    assert checkpoint.export(tmp_path / "x.pth", tmp_path / "out") == "vit_tiny_patch16_224"
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, img_size=96).eval()
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), model.eval()(images)[:, 0], atol=1e-5, rtol=0)


# What does not fit.


def test_tables_are_fitted(states, tmp_path):
    table = states["encoder"]["pos_embed"]
    torch.save({**states["encoder"], "pos_embed": table[:, 1:]}, tmp_path / "x.pth")
    model = VisionTransformer(**{**SIZES, "img_size": (48, 32)})
    own = model.pos_embed[:, :1].clone()
    checkpoint.load(model, tmp_path / "x.pth")
    assert torch.equal(model.pos_embed[:, :1], own)  # the file has no row for the class token
    image = table[:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(image, (6, 4), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.pos_embed[:, 1:], expected)
    # A table without a row for the class token, as a detector has it.
    model.pos_embed = torch.nn.Parameter(torch.zeros(1, 16, 32))
    model.grid = (4, 4)
    torch.save(states["encoder"], tmp_path / "x.pth")
    checkpoint.load(model, tmp_path / "x.pth")
    torch.testing.assert_close(model.pos_embed.data, table[:, 1:])
    # Relative positions: linear along their length.
    model.blocks[0].attn.register_parameter("rel_pos_h", torch.nn.Parameter(torch.zeros(5, 3)))
    tall = torch.arange(9.0)[:, None] * torch.tensor([1.0, 2.0, -1.0])
    torch.save({**states["encoder"], "blocks.0.attn.rel_pos_h": tall}, tmp_path / "x.pth")
    report = checkpoint.load(model, tmp_path / "x.pth")
    assert any("rel_pos_h (9, 3) -> (5, 3)" in line for line in report.resized)
    torch.testing.assert_close(model.blocks[0].attn.rel_pos_h[2], tall[4])


def test_files_that_do_not_fit_say_so_in_one_line(states, tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"format": "semaim", "model": states["encoder"], "config": {"model": {"network": SIZES}}}, path)

    def refuses(message, **changes):
        with pytest.raises(UserError, match=message) as error:
            checkpoint.load(VisionTransformer(**{**SIZES, **changes}), path)
        assert "\n" not in str(error.value)

    refuses("x.pth is a ViT of width 32, depth 2, patch 8; the model a ViT of width 64", embed_dim=64)
    refuses("the model a ViT of width 32, depth 3, patch 8: choose a config", depth=3)
    refuses("depth 1, patch 8", depth=1)
    refuses("patch 16", patch_size=16)
    refuses("trained with 2 heads, the model has 4", num_heads=4)
    refuses("the model a ViT", mlp_ratio=2)
    with pytest.raises(UserError, match="Linear is no ViT of ours"):
        checkpoint.load(torch.nn.Linear(2, 2), path)

    def unreadable(message, name="x.pth"):
        with pytest.raises(UserError, match=message) as error:
            checkpoint.read(tmp_path / name)
        assert "\n" not in str(error.value) and len(str(error.value)) < 300

    unreadable("no such checkpoint", "none.pth")
    torch.save({"state_dict": {"conv1.weight": torch.zeros(3), "fc.weight": torch.zeros(3)}}, path)
    unreadable("no ViT encoder in .*it holds conv1, fc")
    torch.save([1, 2], path)
    unreadable("no ViT encoder in .*it holds nothing")
    torch.save({"patch_embed.proj.weight": torch.zeros(3, 3, 3, 3), "layers.0.blocks.0.x": torch.zeros(3)}, path)
    unreadable("no plain ViT encoder")
    for name in ("a.pth", "a.safetensors", "a.pkl"):
        (tmp_path / name).write_bytes(b"")
        unreadable("broken or no checkpoint", name)
        (tmp_path / name).write_text("hello, this is no checkpoint\n" * 20)
        unreadable("broken or no checkpoint", name)
    torch.save(states["encoder"], path)
    path.write_bytes(path.read_bytes()[:5000])
    unreadable("broken or no checkpoint")


def test_conversion_refuses_what_it_cannot_write(states, tmp_path):
    path = tmp_path / "x.pth"
    torch.save(states["encoder"], path)
    before = path.read_bytes()
    for out, to, message in (
        (path, "timm", "is the checkpoint itself"),
        (tmp_path / "y.safetensors", "mae", "name a .pth"),
        (tmp_path / "y.pth", "timmm", "unknown dialect 'timmm': did you mean timm"),
    ):
        with pytest.raises(UserError, match=message):
            checkpoint.convert(path, out, to)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# Files that would run code.


class Call:
    """Pickles to a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class HistoryBuffer:
    """As mmengine's: it pickles functions that it fetches with getattr."""


HistoryBuffer.__module__, HistoryBuffer.__qualname__ = "mmengine.logging.history_buffer", "HistoryBuffer"


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
@pytest.mark.parametrize("where", ["value", "getattr", "eval"])
def test_hostile_files_are_refused_by_name_and_never_run(suffix, where, states, tmp_path):
    made = tmp_path / "made"
    hostile = {
        "value": Call(os.system, f"touch {made}"),
        "getattr": Call(getattr, Call(__import__, "os"), "system"),
        "eval": Call(eval, f"open({str(made)!r}, 'w').close()"),
    }[where]
    path = tmp_path / f"x.{suffix}"
    content = {"model": states["encoder"], "args": hostile}
    if suffix == "pkl":
        path.write_bytes(pickle.dumps({"args": hostile}))
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match="is refused: reading it would call ") as error:
        checkpoint.read(path)
    assert not made.exists() and "\n" not in str(error.value)
    # The file does what it is accused of.
    if where != "getattr":
        with open(path, "rb") as file:
            pickle.load(file) if suffix == "pkl" else torch.load(path, weights_only=False)
        assert made.exists()


def test_records_of_the_fields_tools_are_read_as_inert(states, tmp_path, monkeypatch):
    import types

    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = HistoryBuffer
    monkeypatch.setitem(sys.modules, "mmengine.logging.history_buffer", module)
    ran = []
    HistoryBuffer.__setstate__ = lambda self, state: ran.append(state)
    buffer = HistoryBuffer()
    buffer.values, buffer.mean = np.arange(3.0), Call(getattr, os, "getcwd")
    content = {"model": states["encoder"], "args": argparse.Namespace(lr=0.1), "message_hub": {"loss": buffer},
               "epoch": 4, "path": Path("x")}  # fmt: skip
    buffer.mean = Call(getattr, HistoryBuffer, "mean")
    torch.save(content, tmp_path / "x.pth")
    found = checkpoint.read(tmp_path / "x.pth")
    assert found.epoch == 4 and len(found.state) == 30 and not ran
    held = checkpoint.read_file(tmp_path / "x.pth")
    assert not isinstance(held["args"], argparse.Namespace) and not isinstance(held["path"], Path)
    assert type(held["message_hub"]["loss"]).__name__ == "StandIn"


# The tool.


def tool(*arguments):
    line = [sys.executable, str(ROOT / "tools/checkpoint.py"), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_the_tool(pretrained, tmp_path):
    done = tool("inspect", pretrained)
    assert done.returncode == 0, done.stderr
    told = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert told["encoder"] == "ViT of width 32, depth 2, patch 8, 32 px" and told["heads"] == "2"
    assert told["epochs"] == "1" and told["beside"].startswith("it") and "query_blocks" in done.stdout
    assert told["detection"].startswith("27 tensors")
    done = tool("convert", pretrained, tmp_path / "x.safetensors", "--to", "timm")
    assert done.returncode == 0 and "left out: query_blocks (" in done.stdout
    assert len(load_file(tmp_path / "x.safetensors")) == 30
    done = tool("export", pretrained, tmp_path / "out")
    assert done.returncode == 0 and sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    done = tool("inspect", ROOT / "setup.py")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "setup.py" in done.stderr
