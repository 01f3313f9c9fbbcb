"""Segmentors: every config builds and is what it says; they train, resume and are measured through the tools."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmseg", reason="mmsegmentation is not installed: tools/setup.sh --extras all")

from mmengine.registry import MODELS  # noqa: E402

from semaim.data.scenes import CLASSES, write_scenes  # noqa: E402
from semaim.engine import dense  # noqa: E402
from semaim.engine.checkpointing import read_checkpoint, write_checkpoint  # noqa: E402
from semaim.engine.config import load_config  # noqa: E402
from semaim.models.vit import SIZES, VisionTransformer  # noqa: E402
from semaim.pictures import read_scalars  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "mmseg_configs").glob("*.py"))
SCENES = "mmseg_configs/semaim_upernet_scenes.py"
SMALL = {
    "model.backbone.embed_dim": 32,
    "model.backbone.num_heads": 2,
    "model.backbone.pretrain_img_size": 32,
    "model.neck.embed_dim": 32,
    "model.decode_head.in_channels": "32,32,32,32",
    "model.auxiliary_head.in_channels": 32,
    "num_workers": 0,
    "total_batch_size": 4,
    "train_cfg.max_iters": 4,
    "train_cfg.val_interval": 4,
    "default_hooks.checkpoint.interval": 2,
    "default_hooks.logger.interval": 1,
    "log_processor.window_size": 1,
}


def tool(name, *arguments):
    """A command-line tool, run for real on the CPU."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    line = [str(ROOT / "tools" / name), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=400, env=env, cwd=ROOT)


def options(**more):
    """--cfg-options that make the scenes' segmentor small."""
    return ["--cfg-options", *(f"{key}={value}" for key, value in {**SMALL, **more}.items())]


def losses(folder):
    """iteration -> training loss, all digits."""
    return {line["iter"]: line["loss"] for line in read_scalars(folder)}


def metrics(folder):
    """What a run measured."""
    return json.loads((Path(folder) / "results.json").read_text())["metrics"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_builds_and_its_name_tells_the_truth(path):
    cfg = load_config(path)
    dense.enter(cfg)
    with torch.device("meta"):
        segmentor = MODELS.build(cfg.model)
    size = next((part for part in path.stem.split("_") if part in SIZES), "base")
    if "scenes" in path.stem:
        size = "tiny"
        names = tuple(cfg.train_dataset.metainfo.classes)
        assert names == (*CLASSES, "background") == tuple(cfg.val_dataset.metainfo.classes)
        assert cfg.model.decode_head.num_classes == len(names) == cfg.model.auxiliary_head.num_classes
    else:
        assert cfg.train_cfg.max_iters == 160000 == cfg.param_scheduler[-1]["end"] and cfg.total_batch_size == 16
        assert cfg.model.decode_head.num_classes == 150
    assert segmentor.backbone.embed_dim == SIZES[size]["embed_dim"] and len(segmentor.backbone.out_blocks) == 4
    assert cfg.total_batch_size % cfg.images_per_gpu == 0


def test_the_main_config_is_the_released_recipe():
    cfg = load_config(ROOT / "mmseg_configs/semaim_upernet.py")
    assert (cfg.total_batch_size, cfg.base_lr, cfg.base_batch_size) == (16, 1e-4, 16)
    assert cfg.optim_wrapper.type == "BFloat16OptimWrapper" and cfg.optim_wrapper.paramwise_cfg.layer_decay == 0.65
    assert cfg.optim_wrapper.optimizer == {"type": "AdamW", "betas": (0.9, 0.999), "weight_decay": 0.05}
    assert cfg.param_scheduler[0]["end"] == 1500 == cfg.param_scheduler[1]["begin"]
    assert cfg.model.test_cfg == {"mode": "slide", "crop_size": (512, 512), "stride": (341, 341)}
    assert cfg.model.backbone.drop_path_rate == 0.1 and cfg.model.decode_head.channels == 768
    assert cfg.model.auxiliary_head.loss_decode.loss_weight == 0.4


def test_a_pretrained_encoder_trains_on_two_processes_resumes_and_is_measured(tmp_path):
    encoder = VisionTransformer(embed_dim=32, depth=4, num_heads=2, img_size=32, patch_size=8)
    pretrained = tmp_path / "encoder.pth"
    write_checkpoint({"model": encoder.state_dict()}, pretrained)
    write_scenes(tmp_path / "scenes", 15, 64, seed=0)
    ade, whole, parts = tmp_path / "scenes/ade", tmp_path / "whole", tmp_path / "parts"
    places = ["--data-root", ade, "--pretrained", pretrained]
    keep = {"default_hooks.checkpoint.keep": 0}
    done = tool("dist_train.sh", SCENES, 2, *places, "--work-dir", whole, *options(**keep))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "loaded 52 tensors" in done.stdout and "MISSING" not in done.stdout
    assert read_checkpoint(whole / "latest.pth")["classes"] == [*CLASSES, "background"]

    parts.mkdir()
    shutil.copy(whole / "iter_2.pth", parts)
    (parts / "latest.pth").symlink_to("iter_2.pth")
    done = tool("dist_train.sh", SCENES, 2, *places, "--work-dir", parts, "--resume", *options())
    assert done.returncode == 0, done.stderr[-3000:]
    first, again = losses(whole), losses(parts)
    assert list(again) == [3, 4] and all(again[step] == first[step] for step in again)

    out = tmp_path / "test"
    done = tool("dist_test.sh", SCENES, whole / "latest.pth", 1, "--data-root", ade, "--work-dir", out, *options())
    assert done.returncode == 0, done.stderr[-3000:]
    assert metrics(out) == pytest.approx(metrics(whole), abs=1e-6) and "mIoU" in metrics(out)
