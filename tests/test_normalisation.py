"""Mean and std of the images: those of the encoder's file, the config's own, or ImageNet's; the same in every stage."""

import json
import sys

import numpy as np
import pytest
import timm
import torch
from commands import ROOT, flags, one_line, results, tool
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from timm.models import _hub

from semaim import checkpoints
from semaim.checkpoints import hub_config
from semaim.checkpoints.files import read_checkpoint, write_checkpoint
from semaim.checkpoints.normalisation import choose, settle
from semaim.engine.config import load_config, set_data_root
from semaim.engine.dense import averaged
from semaim.engine.images import build_datasets
from semaim.engine.pretraining import model_from_checkpoint
from semaim.engine.results import statistics_of
from semaim.engine.testing import test as evaluate
from semaim.engine.training import train
from semaim.errors import UserError
from semaim.registry import build_model, task_of

MEAN, STD = [0.5, 0.4, 0.3], [0.5, 0.25, 0.2]
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SIZES = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2}
KNN = "semaim/configs/knn/vit_tiny_scenes.py"
#: At 28 of 32 pixels timm and we resize alike: the scenes stay as they are.
SMALL = {f"model.network.{key}": value for key, value in SIZES.items()}
SMALL |= {"dataset.crop_pct": 0.875, "num_workers": 0, "evaluation.ks": [5]}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A model of timm's with statistics of its own, and the folder that timm writes of it."""
    torch.manual_seed(0)
    told = {"mean": MEAN, "std": STD, "input_size": (3, 28, 28), "crop_pct": 0.875, "interpolation": "bicubic"}
    model = timm.create_model("vit_base_patch16_224", pretrained_cfg_overlay=told, num_classes=0, **SIZES).eval()
    folder = tmp_path_factory.mktemp("hub")
    _hub.save_for_hf(model, folder, model_config={"pretrained_cfg": told}, safe_serialization=True)
    return model, folder / "model.safetensors"


def test_knn_sees_images_as_timm_does(hub, labelled, tmp_path):
    """Through the tool: features as timm's model has them under timm's own transform, and results that say so."""
    model, weights = hub
    options = flags(SMALL)
    done = tool("test.py", KNN, weights, "--data-root", labelled, "--work-dir", tmp_path, *options)
    assert done.returncode == 0, done.stderr
    line = (
        "images normalised with mean (0.5, 0.4, 0.3), std (0.5, 0.25, 0.2), from the config next to model.safetensors"
    )
    assert line in done.stdout
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    paths = sorted((labelled / "val").rglob("*.jpg"))
    with torch.no_grad():
        images = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
        features = model.forward_features(images)[:, 0]
    found = np.load(tmp_path / "features/val/features.npy").astype(np.float32)
    assert np.abs(found - features.numpy()).max() < 2e-3  # kept in fp16
    told = results(tmp_path)
    assert (told["mean"], told["std"], told["statistics_from"]) == (
        MEAN,
        STD,
        "from the config next to model.safetensors",
    )

    # What is set wins, and features of other images are not those in the cache.
    mean, std = [0.25] * 3, [0.75] * 3
    cfg = load_config(ROOT / KNN, {**SMALL, "dataset.mean": mean, "dataset.std": std, "dataset.root": str(labelled)})
    cfg.work_dir = str(tmp_path)
    evaluate(cfg, str(weights))
    told = results(tmp_path)
    assert (told["mean"], told["std"]) == (mean, std) and told["statistics_from"].startswith("as dataset.mean")
    other = np.load(tmp_path / "features/val/features.npy")
    with torch.no_grad():
        again = (images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1) - 0.25) / 0.75
        assert np.abs(other - model.forward_features(again)[:, 0].numpy()).max() < 2e-3
    assert np.abs(other - found).max() > 0.1


PRETRAIN = "semaim/configs/pretrain/semaim_vit_tiny_scenes.py"


def pretraining(scenes):
    """Options of a second's pretraining."""
    return {
        **{f"model.network.{key}": value for key, value in {**SIZES, "img_size": 32, "patch_size": 8}.items()},
        **{"dataset.mean": MEAN, "dataset.std": STD, "dataset.root": str(scenes), "total_batch_size": 8},
        **{"num_workers": 0, "train_cfg.max_epochs": 1, "param_scheduler.warmup": 0},
        "default_hooks.pictures.interval": 0,
    }


@pytest.fixture(scope="module")
def ours(scenes, tmp_path_factory):
    """A checkpoint of ours, pretrained with these statistics."""
    cfg = load_config(ROOT / PRETRAIN, pretraining(scenes))
    cfg.work_dir = str(tmp_path_factory.mktemp("ours"))
    runner = train(cfg)
    pixels = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
    white = [(1 - mean) / std for mean, std in zip(MEAN, STD, strict=True)]
    assert runner.model.data_preprocessor.normalise(pixels).flatten().tolist() == pytest.approx(white)
    return f"{cfg.work_dir}/epoch_1.pth"


def test_a_run_of_ours_hands_its_statistics_on(ours, scenes, tmp_path):
    """To itself resumed, its pictures, the next stage, an export that timm opens, and to other dialects."""
    options = {key: value for key, value in pretraining(scenes).items() if key not in ("dataset.mean", "dataset.std")}
    cfg = load_config(ROOT / PRETRAIN, {**options, "train_cfg.max_epochs": 2})
    cfg.work_dir = str(tmp_path / "resumed")
    resumed = train(cfg, ours).model.data_preprocessor
    assert (resumed.mean.flatten() / 255).tolist() == pytest.approx(MEAN)
    drawn = model_from_checkpoint(read_checkpoint(ours)).data_preprocessor
    assert (drawn.mean.flatten() / 255).tolist() == pytest.approx(MEAN)
    assert (drawn.std.flatten() / 255).tolist() == pytest.approx(STD)
    for name in ("finetune/vit_tiny_scenes.py", "knn/vit_tiny_scenes.py", "pretrain/semaim_vit_tiny_scenes.py"):
        cfg = load_config(ROOT / "semaim/configs" / name)
        found = settle(cfg, ours)
        assert (cfg.dataset.mean, cfg.dataset.std) == (MEAN, STD) and found.origin == "from the config in epoch_1.pth"
        assert settle(cfg, None).origin == found.origin  # a process that is asked twice
    checkpoints.export(ours, tmp_path / "timm")
    opened = resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path}/timm", pretrained=True))
    assert (list(opened["mean"]), list(opened["std"])) == (MEAN, STD)
    checkpoints.convert(tmp_path / "timm/model.safetensors", tmp_path / "mae.pth", "mae")
    checkpoints.convert(tmp_path / "mae.pth", tmp_path / "mm.pth", "mmpretrain")
    checkpoints.convert(tmp_path / "mm.pth", tmp_path / "semaim.pth", "semaim")
    for name in ("mae", "mm", "semaim"):
        assert list(checkpoints.read(tmp_path / f"{name}.pth").statistics.mean) == MEAN, name
    assert "mean (0.5, 0.4, 0.3), std (0.5, 0.25, 0.2), from" in checkpoints.inspect(ours)
    done = tool("checkpoint.py", "convert", ours, tmp_path / "bare.safetensors", "--to", "timm")
    assert "this file holds none: set dataset.mean and dataset.std" in done.stdout
    assert checkpoints.read(tmp_path / "bare.safetensors").statistics is None


@pytest.mark.parametrize("augment", ["randaugment", "resized_crop", "random_crop"])
def test_training_and_validation_images_are_normalised_alike(augment, labelled):
    """A white image, whichever way it is cropped."""
    more = {"rand_augment": "rand-m0-n0", "random_erase": 0.0} if augment == "randaugment" else {}
    options = {"dataset.root": str(labelled), "dataset.augment": augment, "dataset.mean": MEAN, "dataset.std": STD}
    cfg = load_config(ROOT / "semaim/configs/finetune/vit_tiny_scenes.py", options)
    cfg.dataset.update(more)
    white = [(1 - mean) / std for mean, std in zip(MEAN, STD, strict=True)]
    for images in build_datasets(cfg):
        pixels = images.transform(Image.new("RGB", (40, 32), "white"))
        assert pixels.flatten(1).mean(dim=1).tolist() == pytest.approx(white, abs=1e-5)


def test_a_classifier_is_tested_with_the_statistics_of_its_training(ours, labelled, tmp_path):
    tuning = {f"model.network.{key}": value for key, value in {**SIZES, "img_size": 32, "patch_size": 8}.items()}
    tuning |= {"total_batch_size": 8, "images_per_gpu": 8, "num_workers": 0, "train_cfg.max_epochs": 1}
    tuning |= {"param_scheduler.warmup": 0, "dataset.root": str(labelled)}

    def config(folder):
        cfg = load_config(ROOT / "semaim/configs/finetune/vit_tiny_scenes.py", tuning)
        cfg.work_dir = str(tmp_path / folder)
        return cfg

    cfg = config("run")
    cfg.pretrained = ours
    train(cfg)
    trained = results(tmp_path / "run")
    assert (trained["mean"], trained["std"]) == (MEAN, STD)
    evaluate(config("test"), f"{tmp_path}/run/epoch_1.pth")
    tested = results(tmp_path / "test")
    assert (tested["mean"], tested["std"]) == (MEAN, STD) and tested["statistics_from"].endswith("in epoch_1.pth")
    assert tested["metrics"] == pytest.approx(trained["metrics"])
    # A run from before there were statistics had ImageNet's, and goes on with them, whatever it started from.
    content = read_checkpoint(f"{tmp_path}/run/epoch_1.pth")
    for key in ("mean", "std"):
        del content["config"]["dataset"][key]
    write_checkpoint(content, tmp_path / "old.pth")
    assert list(choose(config("x"), tmp_path / "old.pth").mean) == IMAGENET[0]


def test_a_teacher_is_given_the_students_statistics(monkeypatch):
    seen = {}

    class Guide(Exception):
        pass

    def teacher(name, **options):
        seen.update(options)
        raise Guide

    monkeypatch.setattr("semaim.methods.semaim.build_teacher", teacher)
    cfg = load_config(ROOT / "semaim/configs/pretrain/semaim_clip_vit_base_800e.py")
    settle(cfg, None)
    with pytest.raises(Guide):
        build_model(task_of(cfg).model_config(cfg))
    assert (list(seen["mean"]), list(seen["std"])) == IMAGENET


def test_statistics_that_are_none_are_an_error(tmp_path):
    def refuses(message, config="semaim/configs/knn/vit_base.py", **options):
        with pytest.raises(UserError, match=message):
            load_config(ROOT / config, {key.replace("__", "."): value for key, value in options.items()})

    refuses("dataset.std is set and dataset.mean is not: set both", dataset__std=STD)
    refuses("dataset.mean is .* three numbers from 0 to 1", dataset__mean=[0.5, 0.5], dataset__std=STD)
    refuses("dataset.mean is .* three numbers from 0 to 1", dataset__mean=[123.7, 116.3, 103.5], dataset__std=STD)
    refuses("dataset.mean is 'half'", dataset__mean="half", dataset__std=STD)
    refuses("dataset.std is .* three numbers above 0", dataset__mean=MEAN, dataset__std=[0.5, 0, 0.5])
    refuses("dataset.std is .* three numbers above 0", dataset__mean=MEAN, dataset__std=[0.5, float("nan"), 0.5])
    for folder, model in (("mmdet", "semaim_mask_rcnn"), ("mmseg", "semaim_upernet")):
        path, pixels = f"{folder}_configs/{model}.py", "model__data_preprocessor__"
        refuses("data_preprocessor.mean is set and .*std is not: set both", path, **{f"{pixels}mean": [9, 9, 9]})
        refuses(r"std is \[0.5, .* pixels from 0 to 255", path, **{f"{pixels}mean": MEAN, f"{pixels}std": STD})
    one_line(
        tool("test.py", "semaim/configs/knn/vit_base.py", "random", "--cfg-options", "dataset.mean=0.5,0.5,2"),
        "dataset.mean is set and dataset.std is not",
    )
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    cfg = load_config(ROOT / KNN)
    for content, message in (
        ('{"architecture": ', "cannot read .*config.json, next to model.safetensors"),
        ('{"architecture": "x", "pretrained_cfg": {"mean": [1, 2]}}', r"pretrained_cfg.mean is \[1, 2\]"),
        ('{"architecture": "x", "pretrained_cfg": 3}', "pretrained_cfg is no mapping"),
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=message):
            choose(cfg, tmp_path / "model.safetensors")


def test_the_config_that_belongs_to_a_file(tmp_path):
    """Layouts of timm as timm reads them itself; nothing where the file is not the one that is meant."""
    new = {
        "architecture": "x",
        "num_classes": 3,
        "model_args": {"depth": 2},
        "pretrained_cfg": {"mean": MEAN, "std": STD},
    }
    old = {"architecture": "x", "num_features": 5, "mean": MEAN, "std": STD, "crop_pct": 0.9}
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    weights.touch()
    assert hub_config.find(weights) is None
    for layout in (new, old):
        config.write_text(json.dumps(layout))
        found = hub_config.find(weights)
        pretrained_cfg, architecture, model_args = _hub._parse_model_cfg(json.loads(config.read_text()), {})
        assert (found["architecture"], found["model_args"]) == (architecture, model_args)
        assert {k: found["pretrained_cfg"][k] for k in ("mean", "std")} == {"mean": MEAN, "std": STD}
        assert {k: pretrained_cfg[k] for k in ("mean", "std")} == {"mean": MEAN, "std": STD}
    (tmp_path / "other.pth").touch()
    assert hub_config.find(tmp_path / "other.pth") is None and hub_config.find(weights)
    (tmp_path / "other.json").write_text(json.dumps(new))
    assert hub_config.find(tmp_path / "other.pth") == new
    weights.unlink()
    (tmp_path / "other.json").unlink()
    assert hub_config.find(tmp_path / "other.pth")  # alone with it
    config.write_text(json.dumps({"architectures": ["ViTModel"], "hidden_size": 4}))  # of another library
    assert hub_config.find(tmp_path / "other.pth") is None


def test_detectors_and_segmentors_take_them_times_255(hub):
    """A config's own preprocessor holds ImageNet's, as all of ours do; what it sets otherwise, or an option, wins."""
    _, weights = hub
    for name in ("mmdet_configs/semaim_mask_rcnn.py", "mmseg_configs/semaim_upernet.py"):
        cfg = load_config(ROOT / name)
        assert settle(cfg, weights).origin == "from the config next to model.safetensors"
        assert cfg.model.data_preprocessor.mean == [127.5, 102, 76.5]
        assert cfg.model.data_preprocessor.std == [127.5, 63.75, 51]
        if "tta_ratios" in cfg:
            averaged(cfg)  # the model is within another then
        assert statistics_of(cfg)["mean"] == (0.5, 0.4, 0.3)
        cfg = load_config(ROOT / name)
        assert settle(cfg, None).origin == "ImageNet's"
        assert cfg.model.data_preprocessor.mean == [123.675, 116.28, 103.53]
        assert cfg.model.data_preprocessor.std == [58.395, 57.12, 57.375]
        explicit = {f"model.data_preprocessor.{key}": cfg.model.data_preprocessor[key] for key in ("mean", "std")}
        cfg = load_config(ROOT / name, explicit)
        assert settle(cfg, weights).origin == "as model.data_preprocessor.mean and model.data_preprocessor.std say"
        assert cfg.model.data_preprocessor.mean == [123.675, 116.28, 103.53]
        cfg = load_config(ROOT / name)
        cfg.model.data_preprocessor.mean = [1.0, 2.0, 3.0]  # a config file of the user's
        assert settle(cfg, weights).mean == pytest.approx((1 / 255, 2 / 255, 3 / 255))


def test_a_detector_is_trained_tested_and_predicts_with_its_encoders(ours, tmp_path, monkeypatch, capsys):
    pytest.importorskip("mmdet", reason="mmdet is not installed: runs after tools/setup.sh --extras all")
    from semaim.data.scenes import write_scenes
    from semaim.engine.predicting import draw_predictions

    write_scenes(tmp_path / "scenes", 15, 64, seed=0)
    changed = {f"model.backbone.{key}": SIZES[key] for key in ("embed_dim", "num_heads", "depth")}
    changed |= {"model.backbone.pretrain_img_size": 32, "model.neck.in_channels": 32, "num_workers": 0}
    changed |= {"total_batch_size": 4, "train_cfg.max_iters": 1, "train_cfg.val_interval": 1}
    options, name = flags(changed), "mmdet_configs/semaim_mask_rcnn_scenes.py"

    cfg = load_config(ROOT / name, changed)
    set_data_root(cfg, str(tmp_path / "scenes/coco"))
    cfg.pretrained, cfg.work_dir = ours, str(tmp_path / "run")
    runner = train(cfg)
    assert runner.model.data_preprocessor.mean.flatten().tolist() == [127.5, 102, 76.5]
    trained = results(tmp_path / "run")
    assert (trained["mean"], trained["std"]) == (MEAN, STD)

    # The config of the test says nothing of them, the file does.
    line = "images normalised with mean (0.5, 0.4, 0.3), std (0.5, 0.25, 0.2), from the config in iter_1.pth"
    weights, image = tmp_path / "run/iter_1.pth", next((tmp_path / "scenes").rglob("*.jpg"))
    there = ("--data-root", tmp_path / "scenes/coco", "--work-dir", tmp_path / "test")
    done = tool("test.py", name, weights, *there, *options)
    assert done.returncode == 0 and line in done.stdout, done.stderr
    tested = results(tmp_path / "test")
    assert (tested["mean"], tested["std"]) == (MEAN, STD) and tested["metrics"] == trained["metrics"]

    cfg = load_config(ROOT / name, changed)
    set_data_root(cfg, str(tmp_path / "scenes/coco"))
    draw_predictions(cfg, str(weights), most=1)
    assert cfg.model.data_preprocessor.mean == [127.5, 102, 76.5]

    sys.path.insert(0, str(ROOT / "tools"))
    arguments = [f"{ROOT}/{name}", str(weights), str(image), "--out", f"{tmp_path}/out", *options]
    monkeypatch.setattr(sys, "argv", ["predict", *arguments])
    import predict

    assert predict.main() == 0 and line in capsys.readouterr().out
