"""Checkpoints of every dialect: read, loaded with a report, converted, exported - and never run."""

import argparse
import collections
import io
import json
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from commands import tool
from safetensors.torch import load_file, save_file

from semaim import checkpoints
from semaim.checkpoints import checkpoint as checkpoint_module
from semaim.checkpoints.files import read_checkpoint
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


def mmpretrain_decoder(state):
    """mmpretrain's names of MAE's decoder of one block, written out one by one."""
    pairs = {
        "neck.decoder_embed": "decoder_embed", "neck.ln1": "decoder_norm", "neck.decoder_pred": "decoder_pred",
        "neck.decoder_blocks.0.ln1": "decoder_blocks.0.norm1", "neck.decoder_blocks.0.ln2": "decoder_blocks.0.norm2",
        "neck.decoder_blocks.0.attn.qkv": "decoder_blocks.0.attn.qkv",
        "neck.decoder_blocks.0.attn.proj": "decoder_blocks.0.attn.proj",
        "neck.decoder_blocks.0.ffn.layers.0.0": "decoder_blocks.0.mlp.fc1",
        "neck.decoder_blocks.0.ffn.layers.1": "decoder_blocks.0.mlp.fc2",
    }  # fmt: skip
    renamed = {"neck.mask_token": state["mask_token"], "neck.decoder_pos_embed": state["decoder_pos_embed"]}
    for theirs, ours in pairs.items():
        renamed |= {f"{theirs}.{kind}": state[f"{ours}.{kind}"] for kind in ("weight", "bias")}
    return renamed


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
        "mmpretrain": {"meta": {"epoch": 3}, "state_dict": {**mmpretrain(encoder), "neck.other": torch.zeros(3),
                                                              "backbone.layers.0.attn.q_bias": torch.ones(32)}},
        "mmpretrain mae": {"meta": {"epoch": 3}, "state_dict": {**mmpretrain(states["mae"]),
                                                                **mmpretrain_decoder(states["mae"])}},
        "mmpretrain tuned bare": {**{n.removeprefix("backbone."): t for n, t in mmpretrain(encoder).items()},
                                  "head.layers.head.weight": states["tuned_cls"]["head.weight"]},
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
        "mmpretrain mae": states["mae"],
        "mmpretrain tuned bare": {**encoder, "head.weight": states["tuned_cls"]["head.weight"]},
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
    "mmpretrain": "mmpretrain", "mmpretrain mae": "mmpretrain", "mmpretrain tuned bare": "mmpretrain",
    "mmpretrain old": "mmpretrain", "mmpretrain bare": "mmpretrain",
    "detectron2": "detectron2", "detectron2 pkl": "detectron2", "segmentor": "detector or segmentor",
}  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_read_and_loaded(dialect, states, tmp_path):
    path, expected = write(tmp_path, dialect, states)
    found = checkpoints.read(path)
    assert found.dialect == DIALECTS[dialect]
    assert found.state.keys() == expected.keys()
    assert all(torch.equal(found.state[name], expected[name]) for name in expected)
    assert found.heads_guessed
    if dialect == "mmpretrain":  # what has no name of ours is told
        assert found.other == ["neck.other", "backbone.layers.0.attn.q_bias"]
    assert found.sizes == {
        "embed_dim": 32, "depth": 2, "num_heads": 1, "patch_size": (8, 8), "img_size": (32, 32), "mlp_ratio": 4,
    }  # fmt: skip
    if dialect in ("semaim", "official", "mae", "mmpretrain", "mae tuned"):
        assert found.epoch == 3
    model = VisionTransformer(**SIZES)
    tuned = dialect in ("semaim tuned", "mae tuned")  # they pool the patches: no final norm
    told = r"backbone.layers.\*.attn.q_bias" if dialect == "mmpretrain" else tuned and "it lacks norm.weight, norm.bias"
    if told:
        with pytest.raises(UserError, match=told):
            checkpoints.load(model, path)
    report = checkpoints.load(model, path, partial=bool(told))
    assert report.whole == (not told)
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
    report = checkpoints.load(model, tmp_path / "x.pth")
    assert not report.missing and not report.new and not report.unexpected
    assert all(torch.equal(tensor, states[kind][name]) for name, tensor in model.state_dict().items())
    # Another number of classes: the head stays in the file, and the new one is expected or missing.
    last = "head.1" if kind == "probe" else "head"
    wider = Classifier(7, **options)
    report = checkpoints.load(wider, tmp_path / "x.pth", HEAD)
    assert report.new == [f"{last}.weight", f"{last}.bias"] and report.unexpected == report.new and not report.missing
    assert checkpoints.load(wider, tmp_path / "x.pth").missing == report.new


@pytest.mark.parametrize("to", checkpoints.DIALECTS)
@pytest.mark.parametrize("kind", ["encoder", "semaim", "mae", "tuned", "tuned_cls", "probe"])
def test_round_trips_are_bit_equal(kind, to, states, tmp_path):
    start, there, back = tmp_path / "a.pth", tmp_path / "b.pth", tmp_path / "c.pth"
    torch.save({"format": "semaim", "model": states[kind], "config": None, "epoch": 7}, start)
    left = checkpoints.convert(start, there, to)
    checkpoints.convert(there, back, "semaim")
    final = read_checkpoint(back)["model"]
    decoder = {"semaim": ("query_blocks", "prediction_head"), "mae": ("decoder_", "mask_token")}.get(kind, ())
    kept = to == "semaim" or (to in ("mae", "mmpretrain") and kind == "mae")
    expected = {
        name: tensor
        for name, tensor in states[kind].items()
        if not name.startswith("ema.") and (kept or not name.startswith(decoder) or not decoder)
    }
    assert final.keys() == expected.keys()
    assert all(torch.equal(final[name], tensor) for name, tensor in expected.items())
    assert set(left) == states[kind].keys() - expected.keys()
    assert checkpoints.read(there).dialect == to
    if to in ("semaim", "mmpretrain"):
        assert checkpoints.read(there).epoch == 7


@pytest.mark.parametrize("to", checkpoints.DIALECTS)
@pytest.mark.parametrize("start", ["mmpretrain mae", "mmpretrain tuned bare", "mae", "mae tuned", "timm", "dino"])
def test_foreign_files_come_back_under_their_own_names(start, to, states, tmp_path):
    path, weights = write(tmp_path, start, states)
    own = DIALECTS[start]
    checkpoints.convert(path, tmp_path / "there.pth", to)
    checkpoints.convert(tmp_path / "there.pth", tmp_path / "back.pth", own)
    holds = {"mmpretrain": "state_dict", "mae": "model"}.get(own)
    back, first = (torch.load(p, weights_only=p.name == "back.pth") for p in (tmp_path / "back.pth", path))
    back, first = (content[holds] if holds and holds in content else content for content in (back, first))
    if own == "mmpretrain":  # a file of the encoder alone comes back as one of the whole model
        first = {n if n.startswith(("backbone.", "head.", "neck.")) else f"backbone.{n}": t for n, t in first.items()}
    if to == "timm":
        first = {n: t for n, t in first.items() if not n.startswith(("neck.", "decoder_", "mask_token"))}
    assert back.keys() == first.keys() and all(torch.equal(back[name], first[name]) for name in first)


def test_what_a_dialect_has_no_name_for_is_told(states, tmp_path):
    torch.save({**states["encoder"], "blocks.0.attn.rel_pos_h": torch.zeros(7, 16)}, tmp_path / "x.pth")
    left = checkpoints.convert(tmp_path / "x.pth", tmp_path / "y.pth", "mmpretrain", partial=True)
    assert left == ["blocks.0.attn.rel_pos_h"]
    report = checkpoints.load(VisionTransformer(**SIZES), tmp_path / "x.pth", partial=True)
    assert "NOT TAKEN, though the encoder of the file computes with them: blocks.*.attn.rel_pos_h" in str(report)
    torch.save(states["encoder"], tmp_path / "x.pth")
    assert "NOT TAKEN" not in str(checkpoints.load(VisionTransformer(**SIZES), tmp_path / "x.pth"))


def test_the_encoder_is_taken_and_not_its_average(states, tmp_path):
    average = prefixed("ema.", {name: tensor + 1 for name, tensor in states["encoder"].items()})
    torch.save({"state_dict": {**average, **prefixed("module.", states["encoder"])}}, tmp_path / "x.pth")
    found = checkpoints.read(tmp_path / "x.pth")
    assert all(torch.equal(found.state[name], tensor) for name, tensor in states["encoder"].items())
    assert set(found.other) == set(average)


def test_the_number_of_heads(states, tmp_path):
    weights = {"patch_embed.proj.weight": torch.zeros(1280, 3, 16, 16), "blocks.0.mlp.fc1.weight": torch.zeros(5120, 1)}
    heads = lambda network, depth=4: checkpoints.sizes_of(  # noqa: E731
        {**weights, f"blocks.{depth - 1}.norm1.bias": torch.zeros(1)}, network
    )["num_heads"]
    assert heads({"size": "huge", "depth": 4}) == 16  # of the config's model
    assert heads({"size": "huge", "num_heads": 8}) == 8  # named
    assert heads(None, 32) == 16  # of the published model
    assert heads(None) == 20  # 64 channels each
    config = {"model": {"network": SIZES}}
    torch.save({"format": "semaim", "model": states["encoder"], "config": config}, tmp_path / "x")
    assert not checkpoints.read(tmp_path / "x").heads_guessed and "guess" not in checkpoints.inspect(tmp_path / "x")
    torch.save(states["encoder"], tmp_path / "x")
    assert checkpoints.read(tmp_path / "x").heads_guessed and "guess" in checkpoints.inspect(tmp_path / "x")


def test_mmpretrain_names_are_theirs(states, tmp_path):
    torch.save(states["encoder"], tmp_path / "x.pth")
    checkpoints.convert(tmp_path / "x.pth", tmp_path / "y.pth", "mmpretrain")
    written, expected = torch.load(tmp_path / "y.pth", weights_only=True)["state_dict"], mmpretrain(states["encoder"])
    assert written.keys() == expected.keys() and all(torch.equal(written[n], expected[n]) for n in expected)
    heads = {"tuned": "head.fc", "tuned_cls": "head.layers.head", "probe": "head.layers.head"}
    for kind, head in heads.items():
        torch.save(states[kind], tmp_path / "x.pth")
        checkpoints.convert(tmp_path / "x.pth", tmp_path / "y.pth", "mmpretrain")
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
    report = checkpoints.load(token, path, HEAD)
    assert bool(report.resized) == (size != file_size)
    checkpoints.load(mean, path, HEAD)
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
    checkpoints.export(tmp_path / "x.pth", tmp_path / "out")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    classes = 0 if kind in ("encoder", "semaim") else 5
    ours = Classifier(classes, "avg" if kind == "tuned" else "cls", probe=kind == "probe", **SIZES).eval()
    checkpoints.load(ours, tmp_path / "x.pth")
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        out = ours(images) if classes else ours.features(images)
        torch.testing.assert_close(theirs(images), out, atol=1e-5, rtol=1e-5)
    assert theirs.num_classes == classes and tuple(theirs.pretrained_cfg["input_size"]) == (3, 32, 32)
    told = json.loads((tmp_path / "out/config.json").read_text())
    assert told["global_pool"] == ("avg" if kind == "tuned" else "token") and told["label_names"] == list("abcde")


def test_a_published_architecture_is_named_and_opens_at_another_size(tmp_path):
    torch.manual_seed(0)
    model = VisionTransformer("tiny", img_size=64)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    assert checkpoints.export(tmp_path / "x.pth", tmp_path / "out") == "vit_tiny_patch16_224"
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, img_size=96).eval()
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), model.eval()(images)[:, 0], atol=1e-5, rtol=0)


def test_timm_opens_an_encoder_without_final_norm(states, tmp_path):
    state = {name: tensor * 0.1 for name, tensor in states["encoder"].items() if not name.startswith("norm.")}
    torch.save({"format": "semaim", "model": state, "config": {"model": {"network": SIZES}}}, tmp_path / "x.pth")
    checkpoints.export(tmp_path / "x.pth", tmp_path / "out")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    ours = Classifier(0, "avg", probe=True, **SIZES).eval()
    assert not checkpoints.load(ours, tmp_path / "x.pth", HEAD).missing
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours.features(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("size", "patch"), [("small", 16), ("base", 16), ("large", 16), ("huge", 14), ("base", 8)])
def test_published_models_have_timms_names_and_shapes(size, patch, tmp_path, monkeypatch):
    """On the meta device: no memory. `export` compares with timm's model and would refuse."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in VisionTransformer(size, 224, patch).state_dict().items()}
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
    monkeypatch.setattr(checkpoint_module, "read", lambda path: checkpoints.Checkpoint(Path(path), "timm", state, []))
    monkeypatch.setattr(checkpoint_module, "_save_tensors", lambda state, out: out.parent.mkdir())
    name = checkpoints.export("x", tmp_path / "out")
    assert name == ("vit_base_patch16_224" if patch == 8 else f"vit_{size}_patch{patch}_224")
    args = json.loads((tmp_path / "out/config.json").read_text())["model_args"]
    assert ("patch_size" in args) == (patch == 8)


def test_exports_that_timm_could_not_open_are_refused(states, tmp_path):
    def refuses(message, state, out=tmp_path / "out"):
        torch.save(state, tmp_path / "x.pth")
        with pytest.raises(UserError, match=message) as error:
            checkpoints.export(tmp_path / "x.pth", out)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

    encoder = states["encoder"]
    refuses(r"it computes with blocks.\*.attn.rel_pos_h", {**encoder, "blocks.0.attn.rel_pos_h": torch.zeros(7, 16)})
    refuses("it lacks cls_token", {name: tensor for name, tensor in encoder.items() if name != "cls_token"})
    refuses("it lacks pos_embed", {name: tensor for name, tensor in encoder.items() if name != "pos_embed"})
    refuses("in other shapes pos_embed", {**encoder, "pos_embed": torch.zeros(1, 18, 32)})
    (tmp_path / "file").write_text("x")
    refuses("cannot write", encoder, tmp_path / "file")
    own = tmp_path / "own/model.safetensors"
    own.parent.mkdir()
    save_file(encoder, own)
    before = own.read_bytes()
    with pytest.raises(UserError, match="is the checkpoint itself"):
        checkpoints.export(own, own.parent)
    assert own.read_bytes() == before


# What does not fit.


def test_tables_are_fitted(states, tmp_path):
    table = states["encoder"]["pos_embed"]
    torch.save({**states["encoder"], "pos_embed": table[:, 1:]}, tmp_path / "x.pth")
    model = VisionTransformer(**{**SIZES, "img_size": (48, 32)})
    model.pos_embed.data.normal_()
    checkpoints.load(model, tmp_path / "x.pth")
    assert not model.pos_embed[:, :1].any()  # the file has no row for the class token, which is added to nothing
    image = table[:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(image, (6, 4), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.pos_embed[:, 1:], expected)
    # A table without a row for the class token, as a detector has it.
    model.pos_embed = torch.nn.Parameter(torch.zeros(1, 16, 32))
    model.grid = (4, 4)
    torch.save(states["encoder"], tmp_path / "x.pth")
    checkpoints.load(model, tmp_path / "x.pth")
    torch.testing.assert_close(model.pos_embed.data, table[:, 1:])
    # Relative positions: linear along their length.
    model.blocks[0].attn.register_parameter("rel_pos_h", torch.nn.Parameter(torch.zeros(5, 3)))
    tall = torch.arange(9.0)[:, None] * torch.tensor([1.0, 2.0, -1.0])
    torch.save({**states["encoder"], "blocks.0.attn.rel_pos_h": tall}, tmp_path / "x.pth")
    report = checkpoints.load(model, tmp_path / "x.pth")
    assert any("rel_pos_h (9, 3) -> (5, 3)" in line for line in report.resized)
    torch.testing.assert_close(model.blocks[0].attn.rel_pos_h[2], tall[4])


def test_a_table_of_as_many_rows_on_another_grid(states, tmp_path):
    """4 x 4 patches told by the config go to 2 x 8; a bare table is taken as it is."""
    content = {"format": "semaim", "model": states["encoder"], "config": {"model": {"network": SIZES}}}
    wide = VisionTransformer(**{**SIZES, "img_size": (16, 64)})
    torch.save(content, tmp_path / "x.pth")
    assert len(checkpoints.load(wide, tmp_path / "x.pth").resized) == 1
    table = states["encoder"]["pos_embed"]
    image = table[:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(image, (2, 8), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(wide.pos_embed[:, 1:], expected)
    torch.save(states["encoder"], tmp_path / "x.pth")
    assert not checkpoints.load(wide, tmp_path / "x.pth").resized and torch.equal(wide.pos_embed, table)


def test_new_names_are_expected_by_any_part(states, tmp_path):
    torch.save(states["encoder"], tmp_path / "x.pth")
    model = VisionTransformer(**SIZES)
    model.blocks[1].attn.register_parameter("rel_pos_h", torch.nn.Parameter(torch.zeros(5, 3)))
    model.headless = torch.nn.Linear(2, 2)
    report = checkpoints.load(model, tmp_path / "x.pth", ("head", "rel_pos_h"))
    assert report.new == ["blocks.1.attn.rel_pos_h"] and report.missing == ["headless.weight", "headless.bias"]


def test_files_that_do_not_fit_say_so_in_one_line(states, tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"format": "semaim", "model": states["encoder"], "config": {"model": {"network": SIZES}}}, path)

    def refuses(message, **changes):
        with pytest.raises(UserError, match=message) as error:
            checkpoints.load(VisionTransformer(**{**SIZES, **changes}), path)
        assert "\n" not in str(error.value)

    refuses("x.pth is a ViT of width 32, depth 2, patch 8; the model a ViT of width 64", embed_dim=64)
    refuses("the model a ViT of width 32, depth 3, patch 8: choose a config", depth=3)
    refuses("depth 1, patch 8", depth=1)
    refuses("patch 16", patch_size=16)
    refuses("trained with 2 heads, the model has 4", num_heads=4)
    refuses("patch 8; the model a ViT of width 32, depth 2, patch 8, MLP ratio 2", mlp_ratio=2)
    with pytest.raises(UserError, match="SwinTransformer is no ViT of ours"), torch.device("meta"):
        checkpoints.load(timm.create_model("swin_tiny_patch4_window7_224"), path)
    with pytest.raises(UserError, match="Linear is no ViT of ours"):
        checkpoints.load(torch.nn.Linear(2, 2), path)

    def unreadable(message, name="x.pth"):
        with pytest.raises(UserError, match=message) as error:
            checkpoints.read(tmp_path / name)
        assert "\n" not in str(error.value) and len(str(error.value)) < 300

    unreadable("no such checkpoint", "none.pth")
    torch.save({"state_dict": {"conv1.weight": torch.zeros(3), "fc.weight": torch.zeros(3)}}, path)
    unreadable("no ViT encoder in .*it holds conv1, fc")
    torch.save({0: torch.zeros(2), "state": {}}, path)
    unreadable("it holds 0, state")
    torch.save({"optimizer": {}, "lr": 1}, path)
    unreadable("it holds optimizer, lr")
    torch.save({n: t for n, t in states["encoder"].items() if "fc1" not in n}, path)
    unreadable("no plain ViT encoder in .*no blocks.0.mlp.fc1")
    torch.save({"meta": "x", "state_dict": states["encoder"], "epoch": "last"}, path)
    assert checkpoints.read(path).epoch is None
    unreadable("is a folder: name a file", ".")
    (tmp_path / "s.pkl").write_bytes(pickle.dumps({"model": {"names": np.array(["x"])}}))
    unreadable("no ViT encoder", "s.pkl")
    table = {**states["encoder"], "pos_embed": torch.zeros(1, 14, 32)}
    torch.save(table, path)
    with pytest.raises(UserError, match="x.pth: a position table of 14 rows"):
        checkpoints.load(VisionTransformer(**SIZES), path)
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
        (tmp_path, "timm", "Is a directory: [^;]*$"),
        (path / "y.safetensors", "timm", "cannot write"),
    ):
        with pytest.raises(UserError, match=message):
            checkpoints.convert(path, out, to)
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


@pytest.mark.parametrize("suffix", ["pth", "old.pth", "pkl"])
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
        torch.save(content, path, _use_new_zipfile_serialization=suffix == "pth")
    with pytest.raises(UserError, match=f"x.{suffix} is refused: reading it would call ") as error:
        checkpoints.read(path)
    assert not made.exists() and "\n" not in str(error.value)
    # What the file asks for does what it is accused of.
    if where != "getattr":
        function, arguments = hostile.__reduce__()
        function(*arguments)
        assert made.exists()


def zipped_pickle(path, code, states):
    """A zip file of torch's with a pickle written by hand."""
    buffer = io.BytesIO()
    torch.save(states["encoder"], buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for item in old.namelist():
            new.writestr(item, code if item.endswith("data.pkl") else old.read(item))


@pytest.mark.parametrize("environment", [None, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
@pytest.mark.parametrize("allowed", [(), (getattr, collections.deque, print)])
@pytest.mark.parametrize("chain", ["attribute", "call"])
def test_getattr_is_a_stand_in_whatever_the_program_allows(chain, allowed, environment, states, tmp_path, monkeypatch):
    """getattr(deque, "__init__"), then its call: neither happens, also after `add_safe_globals([getattr])`."""
    if environment:
        monkeypatch.setenv(environment, "1")
    attribute = b"\x80\x02c__builtin__\ngetattr\n(ccollections\ndeque\nX\x08\x00\x00\x00__init__tR"
    path = tmp_path / "x.pth"
    zipped_pickle(path, attribute + (b"." if chain == "attribute" else b"(K\x05tR."), states)
    before = set(torch.serialization.get_safe_globals())  # a list in no order
    with torch.serialization.safe_globals(list(allowed)):
        if chain == "attribute":
            held = checkpoints.read_file(path)
            assert type(held).__name__ == "StandIn" and held == held and not held
        else:  # the stand-in that getattr gave is no function that torch would call
            with pytest.raises(UserError, match="cannot read .*more than tensors and plain containers"):
                checkpoints.read_file(path)
        assert set(torch.serialization.get_safe_globals()) == {*before, *allowed}
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("zipped", [True, False])
def test_containers_and_configs_are_read(zipped, states, tmp_path, monkeypatch):
    """Dicts and lists of other classes, keys of other classes; in torch's two formats."""
    node = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    module = types.ModuleType("yacs.config")
    module.CfgNode = node
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    config = node(lr=0.1)
    config.__dict__["frozen"] = True
    content = {
        "model": states["encoder"], "epoch": 4, "args": argparse.Namespace(lr=1), "config": config,
        "history": collections.defaultdict(list, {"loss": [1.0]}), "last": collections.deque([1, 2]),
        Path("a"): {Path("b")}, "mean": np.float64(3), "array": np.arange(3),
    }  # fmt: skip
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    found = checkpoints.read(tmp_path / "x.pth")
    assert found.epoch == 4 and all(torch.equal(found.state[n], t) for n, t in states["encoder"].items())
    held = checkpoints.read_file(tmp_path / "x.pth")
    assert held["config"] == {"lr": 0.1} and type(held["config"]) is not node and held["history"] == {"loss": [1.0]}
    assert type(held["last"]).__name__ == type(held["array"]).__name__ == "StandIn"


def test_whole_models_are_refused_by_name(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pth")
    with pytest.raises(UserError, match="would call torch.nn.modules.linear.Linear"):
        checkpoints.read(tmp_path / "x.pth")


def test_numpys_other_functions_are_refused(tmp_path):
    for name in ("load", "memmap"):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": Call(getattr(np, name), str(tmp_path / "y"))}))
        with pytest.raises(UserError, match=f"x.pkl is refused: reading it would call numpy.*{name}"):
            checkpoints.read(tmp_path / "x.pkl")
    assert not (tmp_path / "y").exists()


def test_records_of_the_fields_tools_are_read_as_inert(states, tmp_path, monkeypatch):
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
    found = checkpoints.read(tmp_path / "x.pth")
    assert found.epoch == 4 and len(found.state) == 30 and not ran
    held = checkpoints.read_file(tmp_path / "x.pth")
    assert not isinstance(held["args"], argparse.Namespace) and not isinstance(held["path"], Path)
    assert type(held["message_hub"]["loss"]).__name__ == "StandIn"


# The tool.


def test_the_tool(pretrained, tmp_path):
    done = tool("checkpoint.py", "inspect", pretrained)
    assert done.returncode == 0, done.stderr
    told = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert told["encoder"] == "ViT of width 32, depth 2, patch 8, 32 px" and told["heads"] == "2"
    assert told["epochs"] == "1" and told["beside"].startswith("it") and "query_blocks" in done.stdout
    assert told["detection"].startswith("27 tensors")
    done = tool("checkpoint.py", "convert", pretrained, tmp_path / "x.safetensors", "--to", "timm")
    assert done.returncode == 0 and "left out: query_blocks (" in done.stdout
    assert len(load_file(tmp_path / "x.safetensors")) == 30
    done = tool("checkpoint.py", "export", pretrained, tmp_path / "out")
    assert done.returncode == 0 and sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert "guess" not in done.stdout
    done = tool("checkpoint.py", "export", tmp_path / "x.safetensors", tmp_path / "bare")
    assert done.returncode == 0 and "1 head, a guess" in done.stdout, done.stdout
    torch.save({"x": Call(os.system, f"touch {tmp_path / 'made'}")}, tmp_path / "evil.pth")
    done = tool("checkpoint.py", "inspect", tmp_path / "evil.pth")
    assert done.returncode == 2 and "would call posix.system" in done.stderr and not (tmp_path / "made").exists()
    done = tool("checkpoint.py", "inspect", ROOT / "setup.py")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "setup.py" in done.stderr


def test_a_converted_checkpoint_says_what_it_cannot_do(states, tiny_config, tmp_path):
    from semaim.engine.pretraining import model_from_checkpoint
    from semaim.engine.training import train

    torch.save(states["encoder"], tmp_path / "timm.pth")
    checkpoints.convert(tmp_path / "timm.pth", tmp_path / "ours.pth", "semaim")
    with pytest.raises(UserError, match="weights without a config"):
        model_from_checkpoint(read_checkpoint(tmp_path / "ours.pth"))
    with pytest.raises(UserError, match="no run to go on with: start from it with --pretrained"):
        train(tiny_config(), str(tmp_path / "ours.pth"))
