"""Encoders of other families through the tools, as a user types it: every task, resumed, tested, used by the next."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from commands import flags, losses, one_line, results, tool
from PIL import Image
from safetensors.torch import save_file

from semaim.data.labelled import find_labelled

EVA = "eva02_tiny_patch14_224"
STEPS = {
    "num_workers": 0, "total_batch_size": 8, "default_hooks.logger.interval": 1,
    "default_hooks.checkpoint.interval": 1, "log_processor.window_size": 1,
}  # fmt: skip


def randomised(arch: str, **arguments) -> torch.nn.Module:
    """timm's network with every weight random."""
    torch.manual_seed(0)
    vit = timm.create_model(arch, pretrained=False, num_classes=0, **arguments).eval()
    for name, parameter in vit.named_parameters():
        parameter.data.normal_(std=0.1).add_(float("norm" in name and name.endswith("weight")))
    return vit


def write_folder(folder, arch: str, cfg: dict, **arguments) -> torch.nn.Module:
    """A folder as timm's hub has it: config.json and the weights."""
    vit = randomised(arch, **arguments)
    folder.mkdir(parents=True)
    save_file(vit.state_dict(), folder / "model.safetensors")
    config = {"architecture": arch, "model_args": arguments, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    return vit


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """DINOv2's kind with registers and layer scale: four blocks, images of 56 pixels."""
    folder = tmp_path_factory.mktemp("dino") / "dino"
    cfg = {"input_size": [3, 56, 56], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "crop_pct": 1.0}
    write_folder(folder, "vit_small_patch14_reg4_dinov2", cfg, depth=4, img_size=56)
    return f"local-dir:{folder}"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub that holds timm's EVA-02 Ti, and its network."""
    repo = tmp_path / "hub" / f"models--timm--{EVA}.mim_in22k"
    cfg = timm.get_pretrained_cfg(f"{EVA}.mim_in22k").to_dict()
    vit = write_folder(repo / "snapshots" / "abc", EVA, cfg)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    return {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}, vit


def knn(source, labelled, folder, *more, config="knn/plain_vit.py", **environment):
    """k-NN of a source."""
    line = [f"semaim/configs/{config}", source, *more, "--data-root", labelled, "--work-dir", folder]
    return tool("test.py", *line, *flags({"num_workers": 0, "evaluation.ks": "[5]"}), **environment)


@torch.no_grad()
def test_features_of_a_name_are_timms_own(hub, labelled, tmp_path):
    environment, vit = hub
    done = knn(f"timm:{EVA}", labelled, tmp_path / "run", **environment)
    assert done.returncode == 0, done.stderr
    found = results(tmp_path / "run")
    assert (found["backbone"], found["checkpoint"]) == (EVA, f"timm:{EVA}")
    assert found["mean"] == pytest.approx(timm.data.OPENAI_CLIP_MEAN) and "timm's" in found["statistics_from"]
    assert found["images"] == {"size": 224, "crop_pct": 0.9, "crop_mode": "center", "interpolation": "bicubic"}
    cfg = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(EVA).to_dict())
    transform = timm.data.create_transform(**cfg)
    paths, _, _ = find_labelled(labelled, "val")
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    features = np.load(tmp_path / "run/features/val/features.npy").astype(np.float32)
    assert np.allclose(features, vit.forward_features(images)[:, 0].numpy(), atol=2e-2, rtol=1e-3)  # kept in fp16
    assert f"timm:{EVA}" not in done.stderr and "Warning" not in done.stdout + done.stderr


@pytest.mark.slow
def test_two_processes_by_the_third_word(dino, labelled, tmp_path):
    for processes, name in ((1, "one"), (2, "two")):
        done = knn(dino, labelled, tmp_path / name, processes)
        assert done.returncode == 0 and "Warning" not in done.stdout + done.stderr, done.stderr
    one, two = (results(tmp_path / name) for name in ("one", "two"))
    assert one["metrics"] == two["metrics"] and two["device"].startswith("2 x")


def test_mean_of_the_patches_and_the_models_own_pooling(dino, labelled, tmp_path):
    found = {}
    for pool in ("cls", "avg", "native"):
        line = ["semaim/configs/linear/plain_vit_fast.py", dino, "--data-root", labelled, "--work-dir", tmp_path / pool]
        options = {"num_workers": 0, "model.network.pool": pool, "evaluation.epochs": 2, "evaluation.held_out": 0.2}
        done = tool("test.py", *line, *flags(options))
        assert done.returncode == 0, done.stderr
        found[pool] = np.load(tmp_path / pool / "features/val/features.npy")
    assert np.array_equal(found["cls"], found["native"]) and not np.allclose(found["cls"], found["avg"])


def train(config, source, folder, options, data, *more):
    """A training from a source; it has to succeed."""
    line = [config, "--pretrained", source, "--data-root", data, "--work-dir", folder, *more]
    done = tool("train.py", *line, *flags(STEPS | options))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def resumed(config, whole, folder, name):
    """The losses of a run resumed from a checkpoint of another."""
    folder.mkdir()
    shutil.copy(whole / name, folder / name)
    (folder / "latest.pth").symlink_to(name)
    done = tool("train.py", config, "--work-dir", folder, "--resume")
    assert done.returncode == 0, done.stderr
    return losses(folder)


@pytest.mark.slow
def test_fine_tuned_resumed_tested_and_measured_by_the_next_task(dino, labelled, tmp_path):
    config, whole = "semaim/configs/finetune/plain_vit_100e.py", tmp_path / "whole"
    options = {"train_cfg.max_epochs": 2, "param_scheduler.warmup": 0.5, "model.mixup": 0, "model.cutmix": 0}
    train(config, dino, whole, options, labelled)
    later = resumed(config, whole, tmp_path / "parts", "epoch_1.pth")
    assert later and later == {step: loss for step, loss in losses(whole).items() if step in later}
    found = results(whole)
    assert found["backbone"] == "vit_small_patch14_reg4_dinov2" and found["mean"] == [0.4, 0.5, 0.6]
    tested = tool("test.py", config, whole / "latest.pth", "--data-root", labelled, "--work-dir", tmp_path / "test",
                  *flags({"num_workers": 0}))  # fmt: skip
    assert tested.returncode == 0, tested.stderr
    assert results(tmp_path / "test")["metrics"]["top1"] == found["metrics"]["top1"]
    assert results(tmp_path / "test")["mean"] == [0.4, 0.5, 0.6]
    done = knn(whole / "latest.pth", labelled, tmp_path / "knn")
    assert done.returncode == 0 and "loaded" in done.stdout, done.stderr
    assert results(tmp_path / "knn")["backbone"] == "vit_small_patch14_reg4_dinov2"


def test_a_probe_leaves_the_encoder_as_it_is(dino, labelled, tmp_path):
    options = {"train_cfg.max_epochs": 1, "param_scheduler.warmup": 0.5}
    train("semaim/configs/linear/plain_vit_90e.py", dino, tmp_path / "run", options, labelled)
    state = torch.load(tmp_path / "run/latest.pth", weights_only=True)["model"]
    vit = randomised("vit_small_patch14_reg4_dinov2", depth=4, img_size=56).state_dict()
    assert all(torch.equal(state[f"encoder.vit.{name}"], tensor) for name, tensor in vit.items())
    assert state["head.1.weight"].shape == (5, 384)


DENSE = {
    "detection": ("mmdet_configs/plain_mask_rcnn_scenes.py", "coco"),
    "segmentation": ("mmseg_configs/plain_upernet_scenes.py", "ade"),
}


@pytest.fixture(scope="module")
def dense_scenes(tmp_path_factory):
    """A few scenes in COCO's and ADE20K's layout."""
    from semaim.data.scenes import write_scenes

    folder = tmp_path_factory.mktemp("dense") / "scenes"
    write_scenes(folder, 24, 96, seed=0)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("task", DENSE)
def test_dense_tasks_train_resume_are_tested_and_predict(task, dino, dense_scenes, tmp_path):
    config, kind = DENSE[task]
    data, whole = dense_scenes / kind, tmp_path / "whole"
    options = {"train_cfg.max_iters": 4, "train_cfg.val_interval": 2, "default_hooks.checkpoint.interval": 2}
    train(config, dino, whole, options, data)
    later = resumed(config, whole, tmp_path / "parts", "iter_2.pth")
    assert later == {step: loss for step, loss in losses(whole).items() if step > 2}
    trained = whole / "latest.pth"
    done = tool("test.py", config, trained, "--data-root", data, "--work-dir", tmp_path / "test")
    assert done.returncode == 0, done.stderr
    found = results(tmp_path / "test")
    assert found["metrics"] == results(whole)["metrics"] and found["backbone"] == "vit_small_patch14_reg4_dinov2"
    assert found["mean"] == pytest.approx([0.4, 0.5, 0.6])
    image = next((dense_scenes / "coco" / "val2017").iterdir())
    done = tool("predict.py", config, trained, image, "--out", tmp_path / "out")
    assert done.returncode == 0 and (tmp_path / "out" / f"{image.stem}.png").is_file(), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("task", DENSE)
def test_a_frozen_encoder_stays_as_it_is(task, dino, dense_scenes, tmp_path):
    config, kind = DENSE[task]
    options = {"train_cfg.max_iters": 2, "train_cfg.val_interval": 2, "default_hooks.checkpoint.interval": 1}
    train(config, dino, tmp_path / "run", options | {"model.backbone.freeze": True}, dense_scenes / kind)
    first, last = (torch.load(tmp_path / "run" / f"iter_{step}.pth", weights_only=True)["model"] for step in (1, 2))
    for name, tensor in first.items():
        if name.startswith("backbone."):
            assert torch.equal(tensor, last[name]), name
    head = "neck.levels.p2.lateral.weight" if task == "detection" else "decode_head.conv_seg.weight"
    assert not torch.equal(first[head], last[head])


@pytest.mark.slow
def test_what_is_not_understood_is_one_line(dino, labelled, dense_scenes, tmp_path):
    siglip = tmp_path / "siglip"
    write_folder(siglip, "vit_base_patch16_siglip_224", {"mean": [0.5] * 3, "std": [0.5] * 3}, depth=1, img_size=32)
    one_line(knn("timm:vit_base_patch14_dinov9", labelled, tmp_path / "a"), "did you mean")
    one_line(knn("timm:resnet50", labelled, tmp_path / "a"), "is no plain ViT")
    one_line(knn(f"local-dir:{siglip}", labelled, tmp_path / "a"), "has no class token: choose avg or native")
    one_line(knn("random", labelled, tmp_path / "a"), "is for any encoder: name one")
    one_line(knn(dino, labelled, tmp_path / "a", config="knn/vit_base.py"), "of width 384 and depth 4")
    done = tool("train.py", "mmdet_configs/semaim_mask_rcnn_scenes.py", "--pretrained", dino, "--data-root",
                dense_scenes / "coco", "--work-dir", tmp_path / "b")  # fmt: skip
    one_line(done, "use a config plain_*.py")
    quick = randomised("vit_base_patch16_clip_quickgelu_224", depth=12, embed_dim=768)
    save_file(quick.state_dict(), tmp_path / "clip.safetensors")
    one_line(knn(tmp_path / "clip.safetensors", labelled, tmp_path / "a"), "activation (GELU, QuickGELU): give --arch")
    one_line(knn(tmp_path / "clip.safetensors", labelled, tmp_path / "a", "--arch", "vit_base_patch16_224"), "it lacks")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "empty")}
    one_line(knn(f"timm:{EVA}", labelled, tmp_path / "a", **offline), "cannot get timm/")
