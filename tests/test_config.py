"""Every config reads and builds; a misspelt one says so."""

import re

import pytest
import torch
from mmengine.registry import LOOPS

import semaim.tasks  # noqa: F401  registers what configs name
from semaim.data.pipelines import changed
from semaim.engine.config import CONFIGS, load_config
from semaim.engine.pretraining import build_network
from semaim.errors import UserError
from semaim.models.vit import SIZES
from semaim.registry import build_model

ALL = sorted(path for path in CONFIGS.rglob("*.py") if path.parent.name != "_base_")
BASE = CONFIGS / "pretrain/semaim_vit_base_800e.py"


@pytest.mark.parametrize("path", ALL, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_config_builds_and_its_name_tells_the_truth(path):
    cfg = load_config(path)
    network = cfg.model.network.to_dict()
    if isinstance(network.get("guide"), dict):
        assert network["guide"].pop("type") == "Teacher"
        network["guide"] = "online"  # the teacher's weights are not here
    if "num_classes" in network and network["num_classes"] is None:
        network["num_classes"] = 10
    if network.get("size", "") is None:  # of any encoder: its source describes it
        network["encoder"] = {"family": "timm", "arch": "vit_tiny_patch16_224"}
    with torch.device("meta"):
        model = build_model({**cfg.model.to_dict(), "network": network})
    if "encoder" in network:
        assert path.stem.startswith("plain_vit") and type(model.network).__name__ == "PlainClassifier"
        return
    size = next(part for part in path.stem.split("_") if part in SIZES)
    width = 128 if {"cifar10", "easy"} & {*path.stem.split("_")} else SIZES[size]["embed_dim"]
    assert network["size"] == size and model.network.embed_dim == width
    assert type(model.network).__name__ == {
        "pretrain": next((name for name in ("SimMIM", "MAE") if name.lower() in path.stem), "SemAIM")
    }.get(path.parent.name, "Classifier")
    if "evaluation" in cfg:
        LOOPS.build(cfg.evaluation)
        assert network["num_classes"] == 0 and cfg.dataset.augment == "none"
        return
    epochs = [part for part in path.stem.split("_") if re.fullmatch(r"\d+e", part)]
    assert not epochs or cfg.train_cfg.max_epochs == int(epochs[0][:-1])
    assert 0 <= cfg.param_scheduler.warmup < 1
    assert cfg.total_batch_size % min(cfg.images_per_gpu, cfg.total_batch_size) == 0


@pytest.mark.parametrize("kind", ["scenes", "scenes_easy", "cifar10"])
def test_small_configs_share_one_encoder(kind):
    """A checkpoint of each small pretraining config fits all evaluations of its data."""
    sizes = set()
    for path in ALL:
        if kind in path.stem and (kind == "scenes_easy") == ("easy" in path.stem):
            network = load_config(path).model.network
            names = ("size", "embed_dim", "depth", "num_heads", "img_size", "patch_size")
            sizes.add(tuple(network.get(name) for name in names))
    assert len(sizes) == 1


def test_the_evaluation_configs_are_the_official_recipes():
    cfg = load_config(CONFIGS / "finetune/vit_base_100e.py")
    assert cfg.total_batch_size == 1024 and cfg.base_lr * 1024 / 256 == pytest.approx(2e-3)
    assert cfg.optim_wrapper.paramwise_cfg.layer_decay == 0.65 and cfg.model.network.drop_path_rate == 0.1
    assert (cfg.model.mixup, cfg.model.cutmix, cfg.model.label_smoothing) == (0.8, 1.0, 0.1)
    assert (cfg.param_scheduler.warmup * cfg.train_cfg.max_epochs, cfg.param_scheduler.min_lr) == (20, 1e-6)
    assert cfg.dataset.random_erase == 0.25 and cfg.dataset.rand_augment.startswith("rand-m9")
    assert cfg.model.network.pool == "avg" and "clip_grad" not in cfg.optim_wrapper
    cfg = load_config(CONFIGS / "linear/vit_base_90e.py")
    assert cfg.total_batch_size == 4096 and cfg.base_lr * 4096 / 256 == pytest.approx(1.6)
    assert cfg.optim_wrapper.optimizer == {"type": "SGD", "momentum": 0.9, "weight_decay": 0.0}
    assert cfg.dataset.augment == "random_crop" and cfg.model.network.pool == "cls" and cfg.model.network.probe
    cfg = load_config(CONFIGS / "linear/vit_base_90e_mae.py")
    assert cfg.total_batch_size == 16384 and cfg.base_lr * 16384 / 256 == pytest.approx(6.4)
    assert cfg.optim_wrapper.optimizer.type == "LARS" and cfg.dataset.augment == "resized_crop"
    for size in ("base", "large"):  # DINO's eval_knn.py, and SemAIM's main_knn.py with --global_pool
        for name, pool, norm, ks in (("", "cls", None, (10, 20, 100, 200)), ("_semaim", "avg", True, (10, 20, 30))):
            cfg = load_config(CONFIGS / f"knn/vit_{size}{name}.py")
            network = cfg.model.network
            assert (network.size, network.pool, network.get("fc_norm")) == (size, pool, norm)
            assert cfg.evaluation == {"type": "NearestNeighbours", "ks": ks, "temperature": 0.07}
    cfg = load_config(CONFIGS / "pretrain/mae_vit_base_800e.py")
    assert cfg.total_batch_size == 4096 and cfg.base_lr * 4096 / 256 == pytest.approx(2.4e-3)
    assert cfg.optim_wrapper.clip_grad is None and cfg.param_scheduler.warmup * cfg.train_cfg.max_epochs == 40
    assert cfg.model.network.mask_ratio == 0.75 and cfg.model.network.target.blur_kernel == 0


def test_the_base_config_is_the_papers_recipe():
    cfg = load_config(BASE)
    assert cfg.total_batch_size == 2048 and cfg.base_lr * 2048 / 256 == pytest.approx(1.6e-3)
    assert cfg.optim_wrapper.optimizer.to_dict() == {"type": "AdamW", "betas": (0.9, 0.95), "weight_decay": 0.05}
    assert cfg.optim_wrapper.clip_grad.max_norm == 3 and cfg.param_scheduler.warmup * cfg.train_cfg.max_epochs == 30
    assert cfg.dataset.min_scale == 0.2 and cfg.compile == "auto"
    assert cfg.model.network.target == {
        "type": "PixelTarget", "blur_kernel": 9, "blur_sigma": 1.0, "norm_pix": True, "loss": "l2"
    }  # fmt: skip


def block_weights(dim):
    """Of a block, encoder's or query's: four linears of dim x dim, an MLP of 4 dim, two norms, all with biases."""
    return 4 * (dim * dim + dim) + (dim * 4 * dim + 4 * dim) + (4 * dim * dim + dim) + 2 * 2 * dim


@pytest.mark.parametrize(
    ("size", "dim", "depth", "query_blocks"),
    [("base", 768, 12, 12), ("large", 1024, 24, 12), ("huge", 1280, 32, 16)],
)
def test_trained_weights_are_those_its_docstring_states(size, dim, depth, query_blocks):
    expected = {
        "encoder": (768 * dim + dim) + dim + depth * block_weights(dim) + 2 * dim,  # patches, class token, norm
        "query blocks": query_blocks * block_weights(dim),
        "head": dim * 4 * dim + 4 * dim + 4 * dim * 768 + 768,
    }
    for epochs in (400, 800):
        network = load_config(CONFIGS / f"pretrain/semaim_vit_{size}_{epochs}e.py").model.network.to_dict()
        with torch.device("meta"):
            model = build_network(network)
        found = dict.fromkeys(expected, 0)
        for name, weight in model.named_parameters():
            part = {"query_blocks": "query blocks", "prediction_head": "head"}.get(name.split(".")[0], "encoder")
            found[part] += weight.numel() * weight.requires_grad
        assert found == expected
    stated = " ".join((CONFIGS / f"pretrain/semaim_vit_{size}_800e.py").read_text().split())
    for part, weights in {**expected, "in all": sum(expected.values())}.items():
        assert f"{part} {weights / 1e6:.1f} M" in stated


def test_large_clip_has_the_decoder_of_large():
    with_clip, pixels = (
        load_config(CONFIGS / f"pretrain/{name}_vit_large_800e.py").model.network for name in ("semaim_clip", "semaim")
    )
    assert with_clip.decoder_depth == pixels.decoder_depth == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"totl_batch_size": 8}, "unknown config key totl_batch_size: did you mean total_batch_size"),
        ({"model.network.ordr": "raster"}, r"unknown config key model.network.ordr: did you mean order\?"),
        ({"model.network.target.blr_kernel": 3}, "model.network.target.blr_kernel: did you mean blur_kernel"),
        ({"model.network.look_precison": "fp32"}, "model.network.look_precison: did you mean look_precision"),
        ({"model.network.drop_path": 0.1}, "unknown config key model.network.drop_path: did you mean drop_path_rate"),
        ({"optim_wrapper.optimizer.type": "AdmW"}, "unknown type 'AdmW' in optim_wrapper.optimizer: did you mean"),
        ({"optim_wrapper.optimizer.momentum": 0.9}, "unknown config key optim_wrapper.optimizer.momentum"),
        ({"train_cfg.epochs": 3}, "unknown config key train_cfg.epochs: did you mean max_epochs"),
        ({"default_hooks.checkpoint.intervall": 3}, "default_hooks.checkpoint.intervall: did you mean interval"),
        ({"dataset.root.x": 1}, "--cfg-options"),
    ],
)
def test_misspelt_keys_are_errors_that_name_the_right_one(options, message):
    with pytest.raises(UserError, match=message):
        load_config(BASE, options)


def test_accepted_arguments_of_base_classes_are_known():
    cfg = load_config(BASE, {"model.network.drop_path_rate": 0.1, "model.network.with_cp": True})
    assert cfg.model.network.with_cp


def test_missing_and_broken_config_files(tmp_path):
    with pytest.raises(UserError, match="no such config.*did you mean semaim/configs/pretrain/semaim_vit_base_800e.py"):
        load_config("semaim_vit_base_800.py")
    (tmp_path / "broken.py").write_text("model = dict(\n")
    with pytest.raises(UserError, match="cannot read config .*broken.py"):
        load_config(tmp_path / "broken.py")


def test_own_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("semaim/configs/pretrain/semaim_vit_base_400e.py").train_cfg.max_epochs == 400


def test_a_pipeline_is_another_with_some_of_its_steps_changed():
    pipeline = [{"type": "Load"}, {"type": "Resize", "scale": 4, "keep_ratio": True}, {"type": "Flip"}]
    found = changed(pipeline, Resize={"scale": 8}, Flip=None)
    assert found == [{"type": "Load"}, {"type": "Resize", "scale": 8, "keep_ratio": True}]
    assert pipeline[1]["scale"] == 4 and len(pipeline) == 3, "that of the other config stays"
    with pytest.raises(UserError, match="the pipeline has no Crop: it has Load, Resize, Flip"):
        changed(pipeline, Crop={"size": 3})
