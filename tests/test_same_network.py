"""An encoder of another network is refused by name, everywhere; what loads gives timm's numbers."""

import json

import pytest
import timm
import torch
from commands import flags, one_line, results, tool
from safetensors.torch import save_file

from semaim import checkpoints
from semaim.checkpoints.consumers import NEW_IN_BACKBONES, load_backbone
from semaim.engine.dense import load_whole
from semaim.engine.images import load_pretrained
from semaim.errors import UserError
from semaim.models.classifier import Classifier
from semaim.models.segvit import SegmentationViT
from semaim.models.vitdet import ViTDet
from semaim.results import load_published
from semaim.results.formats import FORMATS
from semaim.results.table import make_table

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
CONFIG = "semaim/configs/{}/vit_tiny_scenes.py"
TINY = {f"model.network.{name}": SIZES[name] for name in ("img_size", "embed_dim", "depth", "num_heads")}
TINY |= {"num_workers": 0, "images_per_gpu": 4}


def timms(**options):
    """A tiny ViT of timm's, every weight random."""
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(num_classes=0, **SIZES, **options)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    return model


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    """A file as DINOv2's: layer scale in each of two blocks."""
    path = tmp_path_factory.mktemp("scaled") / "dinov2.safetensors"
    save_file(timms(init_values=0.1).state_dict(), path)
    return path


# What no tensor tells.


def hub(folder, architecture, **args):
    """timm's own file of a ViT with config.json beside it."""
    model = timms()
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    args = {**SIZES, **args}
    (folder / "config.json").write_text(json.dumps({"architecture": architecture, "model_args": args}))
    return folder / "model.safetensors"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"act_layer": "quick_gelu"}, r"blocks.\*.mlp.act \(2\) is QuickGELU"),
        ({"norm_layer": "layernorm", "act_layer": "gelu_tanh"}, r"blocks.\*.mlp.act \(2\) is GELUTanh"),
        ({"num_heads": 4}, "it has 4 heads, ours 2"),
        ({"depth": 3}, "the config next to it is of a network of width 32, depth 3"),
        ({"qk_norm": True}, r"blocks.\*.attn.q_norm \(2\), blocks.\*.attn.k_norm \(2\) is LayerNorm"),
        ({"checkpoint_path": "evil.pth"}, "which timm cannot build .model_args names checkpoint_path"),
        ({"nonsense": 1}, "which timm cannot build"),
    ],
)
def test_the_config_beside_a_file_tells_what_no_name_does(options, told, tmp_path):
    path = hub(tmp_path / "x", "vit_tiny_patch16_224", **options)
    model = Classifier(0, "cls", **SIZES)
    with pytest.raises(UserError, match=told) as error:
        checkpoints.load(model, path)
    assert "\n" not in str(error.value)
    report = checkpoints.load(model, path, partial=True)
    assert len(report.matched) == 30 and report.differs and not report.whole
    (path.parent / "config.json").unlink()
    assert checkpoints.load(model, path).whole


def test_names_of_architectures_are_looked_up_and_never_opened(tmp_path):
    for number, name in enumerate(("hf-hub:someone/something", "local-dir:/tmp", "resnet_of_mine")):
        path = hub(tmp_path / str(number), name)
        with pytest.raises(UserError, match=f"its config names the architecture '{name}', which timm"):
            checkpoints.load(Classifier(0, "cls", **SIZES), path)
    path = hub(tmp_path / "plain", "vit_tiny_patch16_224")
    assert checkpoints.load(Classifier(0, "cls", **SIZES), path).whole
    assert checkpoints.read(path).sizes["num_heads"] == 2 and not checkpoints.read(path).heads_guessed
    (path.parent / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json, next to model.safetensors"):
        checkpoints.read(path)


def test_a_class_token_without_position_is_left_without(tmp_path):
    """timm's no_embed_class, as FlexiViT has it: the numbers are timm's, also where the model's row was something."""
    theirs, path = timms(no_embed_class=True).eval(), tmp_path / "flexi.safetensors"
    save_file(theirs.state_dict(), path)
    ours = Classifier(0, "cls", **SIZES).eval()
    ours.pos_embed.data.normal_()
    checkpoints.load(ours, path)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours.features(images), theirs.forward_features(images)[:, 0], atol=1e-5, rtol=1e-5)
        # timm opens an export of it with the same numbers; the config beside the file tells its heads.
        told = {"architecture": "vit_tiny_patch16_224", "model_args": {**SIZES, "no_embed_class": True}}
        path.with_suffix(".json").write_text(json.dumps(told))
        checkpoints.export(path, tmp_path / "out")
        again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        torch.testing.assert_close(again.forward_features(images), theirs.forward_features(images))


def test_a_conversion_says_that_the_heads_get_lost(tmp_path):
    """They leave no tensor: what config.json tells beside the file, nothing tells beside the other."""
    path = hub(tmp_path / "x", "vit_tiny_patch16_224", num_heads=4)
    done = tool("checkpoint.py", "convert", path, tmp_path / "x.pth", "--to", "mae")
    assert done.returncode == 0 and "it has 4 heads" in done.stdout, done.stdout + done.stderr
    guess = checkpoints.read(tmp_path / "x.pth").sizes["num_heads"]
    assert guess != 4 and f"is taken for one of {guess}" in done.stdout


# Every consumer.


@pytest.mark.parametrize("options", [{"init_values": 0.1}, {"reg_tokens": 2}, {"pre_norm": True}, {"qk_norm": True}])
def test_no_road_leaves_it_out_in_silence(options, tmp_path):
    path = tmp_path / "x.pth"
    torch.save(timms(**options).state_dict(), path)
    extra = {"init_values": "ls1.gamma", "reg_tokens": "reg_token", "pre_norm": "norm_pre", "qk_norm": "q_norm"}
    (named,) = (extra[name] for name in options)
    detector, segmentor = ViTDet(pretrain_img_size=32, **SIZES), SegmentationViT(**SIZES)
    roads = (
        lambda: load_pretrained(Classifier(0, "cls", probe=True, **SIZES), path),
        lambda: load_pretrained(Classifier(5, "avg", **SIZES), path),
        lambda: load_backbone(detector, path, "mmdet"),
        lambda: load_backbone(segmentor, path, "mmseg"),
        lambda: checkpoints.convert(path, tmp_path / "y.pth", "semaim"),
        lambda: checkpoints.convert(path, tmp_path / "y.pth", "timm"),
        lambda: checkpoints.export(path, tmp_path / "out"),
    )
    for road in roads:
        with pytest.raises(UserError, match=f"x.pth holds another network's encoder: .*{named}.*--allow-partial"):
            road()
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]
    told = checkpoints.inspect(path)
    assert told.count(named) >= 6 and " tensors;" not in told


@pytest.mark.parametrize("lost", ["cls_token", "pos_embed", "blocks.1.norm1.bias", "patch_embed.proj.bias"])
def test_an_encoder_that_lacks_something_is_refused(lost, tmp_path):
    path, state = tmp_path / "x.pth", timms().state_dict()
    torch.save({name: tensor for name, tensor in state.items() if name != lost}, path)
    for network in (Classifier(0, "cls", **SIZES), Classifier(5, "avg", **SIZES)):
        with pytest.raises(UserError, match=f"it lacks {lost.replace('1', '.', 1)}"):
            load_pretrained(network, path)
        assert lost in load_pretrained(network, path, partial=True).missing


def test_inspect_says_what_the_loaders_take(tmp_path):
    path, model = tmp_path / "x.pth", timms()
    torch.save({**model.state_dict(), "mask_token": torch.zeros(1, 1, 32), "head.weight": torch.zeros(3, 32)}, path)
    lines = {line[:15].strip(): line[16:] for line in checkpoints.inspect(path).splitlines()}
    taken = {
        "k-NN, probes": load_pretrained(Classifier(0, "cls", probe=True, **SIZES), path),
        "with pool=avg": load_pretrained(Classifier(0, "avg", probe=True, **SIZES), path),
        "fine-tuning": load_pretrained(Classifier(7, "avg", **SIZES), path),
        "detection": load_backbone(ViTDet(pretrain_img_size=32, **SIZES), path, "mmdet"),
        "segmentation": load_backbone(SegmentationViT(layer_scale=1.0, **SIZES), path, "mmseg"),
    }
    for name, report in taken.items():
        assert report.whole and lines[name].startswith(f"{len(report.matched)} tensors"), name
    assert [len(report.matched) for report in taken.values()] == [30, 28, 28, 27, 28]
    # A classifier of pooled patches has no norm for the class token; a detector has no class token.
    torch.save(Classifier(5, "avg", **SIZES).state_dict(), path)
    lines = {line[:15].strip(): line[16:] for line in checkpoints.inspect(path).splitlines()}
    assert "it lacks norm.weight, norm.bias" in lines["k-NN, probes"] and lines["fine-tuning"].startswith("30 tensors")
    torch.save({f"backbone.{n}": t for n, t in ViTDet(pretrain_img_size=32, **SIZES).state_dict().items()}, path)
    lines = {line[:15].strip(): line[16:] for line in checkpoints.inspect(path).splitlines()}
    assert "rel_pos_h" in lines["k-NN, probes"] and "it lacks cls_token" in lines["segmentation"]


def test_layer_scale_of_another_family_is_not_taken_for_ours(tmp_path):
    """EVA's and BEiT's gamma_1 stand beside rotary positions or tables, which leave no tensor that would say so."""
    model = SegmentationViT(layer_scale=1.0, rel_bias=False, **SIZES)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"it computes with blocks.\*.gamma_1 \(2\), blocks.\*.gamma_2 \(2\)"):
        checkpoints.load(model, tmp_path / "x.pth", NEW_IN_BACKBONES)
    config = {"model": {"backbone": {"type": "SegmentationViT", **SIZES}}, "default_scope": "mmseg"}
    torch.save({"format": "semaim", "model": model.state_dict(), "config": config}, tmp_path / "x.pth")
    assert checkpoints.load(model, tmp_path / "x.pth", NEW_IN_BACKBONES).whole


def test_a_whole_model_with_more_tensors_is_refused(tmp_path):
    model, path, lines = torch.nn.Linear(2, 2), tmp_path / "x.pth", []
    torch.save({"state_dict": {**model.state_dict(), "backbone.blocks.0.ls1.gamma": torch.ones(2)}}, path)
    with pytest.raises(UserError, match=r"which does not read backbone.blocks.\*.ls1.gamma"):
        load_whole(model, path, lines.append)
    report = load_whole(model, path, lines.append, partial=True)
    assert report.partial_note == "1 of the file's tensors not read" and "NOT LOADED: backbone" in lines[0]


def test_conversion_goes_on_where_it_is_told_to(scaled, tmp_path):
    left = checkpoints.convert(scaled, tmp_path / "x.pth", "mae", partial=True)
    assert not left  # its tensors are the encoder's, so they are kept, and refused again where they are read
    with pytest.raises(UserError, match=r"x.pth holds another network's encoder: it computes with blocks.\*.ls1"):
        checkpoints.convert(tmp_path / "x.pth", tmp_path / "y.pth", "mae")
    done = tool("checkpoint.py", "export", scaled, tmp_path / "out", "--allow-partial")
    assert done.returncode == 0, done.stderr
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert "blocks.0.ls1.gamma" not in theirs.state_dict()


# As a user types it.


def test_knn_of_another_network_is_refused_or_leaves_a_trace(scaled, labelled, tmp_path):
    out = tmp_path / "knn"
    line = [CONFIG.format("knn"), scaled, "--data-root", labelled, "--work-dir", out]
    small = flags({**TINY, "evaluation.ks": "3,10"})
    done = tool("test.py", *line, *small)
    one_line(done, "dinov2.safetensors holds another network's encoder: it computes with blocks.*.ls1.gamma (2)")
    assert not (out / "results.json").exists()
    done = tool("test.py", *line, "--allow-partial", *small)
    assert done.returncode == 0 and "NOT LOADED, though the encoder of the file computes with them" in done.stdout
    found = results(out)
    assert found["allow_partial"] is True and found["load_report"]["matched"] == 30
    assert found["load_report"]["unread"] == ["blocks.*.ls1.gamma (2)", "blocks.*.ls2.gamma (2)"]
    table = FORMATS["md"](make_table([out], load_published()))
    assert "partly loaded: 4 of the file's tensors not read" in table


def test_a_partial_start_is_told_of_what_was_trained_from_it(scaled, labelled, tmp_path):
    out = tmp_path / "tuned"
    line = [CONFIG.format("finetune"), "--data-root", labelled, "--pretrained", scaled, "--work-dir", out]
    changes = {"total_batch_size": 20, "images_per_gpu": 20, "train_cfg.max_epochs": 1}
    small = flags({**TINY, **changes, "param_scheduler.warmup": 0})
    done = tool("train.py", *line, "--allow-partial", *small)
    assert done.returncode == 0, done.stderr
    assert results(out)["partly_loaded"] == "4 of the file's tensors not read"
    # Its own file is read whole, but what it started from was not.
    done = tool("test.py", CONFIG.format("finetune"), out / "latest.pth", "--data-root", labelled,
                "--work-dir", tmp_path / "test", *flags(TINY))  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = results(tmp_path / "test")
    assert found["partly_loaded"] == "4 of the file's tensors not read" and "allow_partial" not in found
    assert not found["load_report"]["unread"] and found["metrics"]["top1"] == results(out)["metrics"]["top1"]
