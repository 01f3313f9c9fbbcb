"""Exports open in timm and compute what ours do; the tool that inspects, converts and exports."""

import json
import os
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from commands import tool
from dialect_files import HEAD, SIZES, Call, random_states
from safetensors.torch import load_file, save_file

from semaim import checkpoints
from semaim.checkpoints import exporting
from semaim.checkpoints.files import read_checkpoint
from semaim.errors import UserError
from semaim.models.classifier import Classifier
from semaim.models.vit import VisionTransformer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def states():
    """Weights of our models, by what they are."""
    return random_states()


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
    monkeypatch.setattr(exporting, "read", lambda path: checkpoints.Checkpoint(Path(path), "timm", state, []))
    monkeypatch.setattr(exporting, "_save_tensors", lambda state, out: out.parent.mkdir())
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


# The tool.


def test_the_tool(pretrained, tmp_path):
    done = tool("checkpoint.py", "inspect", pretrained)
    assert done.returncode == 0, done.stderr
    own, _, plain = done.stdout.partition("\n\nBy the configs plain_*.py, for any encoder:\n")
    told, other = (dict(line.split(maxsplit=1) for line in part.splitlines()) for part in (own, plain))
    assert other["architecture"] == "ViT of width 32, depth 2, patch 8" and "1: class token" in other["prefix"]
    assert other["segmentation"].startswith("28 tensors")
    assert told["encoder"] == "ViT of width 32, depth 2, patch 8, 32 px" and told["heads"] == "2"
    assert told["epochs"] == "1" and told["also"].startswith("in it") and "query_blocks" in told["also"]
    assert told["detection"].startswith("27 tensors")
    done = tool("checkpoint.py", "convert", pretrained, tmp_path / "x.safetensors", "--to", "timm")
    assert done.returncode == 0 and "left out: query_blocks (" in done.stdout
    assert len(load_file(tmp_path / "x.safetensors")) == 30
    done = tool("checkpoint.py", "export", pretrained, tmp_path / "out")
    assert done.returncode == 0 and sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert "guess" not in done.stdout
    killed = [tmp_path / "x.pth", tmp_path / "x.safetensors", tmp_path / "out/model.safetensors"]
    for file in killed:  # as kill -9 leaves it
        file.with_name(f".{file.name}.123.partial").write_bytes(b"half")
    (tmp_path / ".xx.pth.123.partial").touch()
    for line in (["convert", pretrained, killed[0], "--to", "mae"], ["convert", pretrained, killed[1], "--to", "timm"],
                 ["export", pretrained, tmp_path / "out"]):  # fmt: skip
        done = tool("checkpoint.py", *line)
        assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.rglob("*.partial")] == [".xx.pth.123.partial"]
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
    with pytest.raises(UserError, match="no run to resume: start from it with --pretrained"):
        train(tiny_config(), str(tmp_path / "ours.pth"))
