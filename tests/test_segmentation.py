"""Segmentors: every config builds and is what it says; they train, resume and are measured through the tools."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import flags, losses, results, tool
from PIL import Image
from pycocotools import mask as coco_mask

pytest.importorskip("mmseg", reason="mmsegmentation is not installed: runs after tools/setup.sh --extras all")

from mmengine.registry import MODELS  # noqa: E402

from semaim.checkpoints.files import read_checkpoint, write_checkpoint  # noqa: E402
from semaim.data.scenes import CLASSES, LEVELS, write_scenes  # noqa: E402
from semaim.engine import dense  # noqa: E402
from semaim.engine.config import load_config, set_data_root  # noqa: E402
from semaim.engine.encoders import settle_images  # noqa: E402
from semaim.engine.training import prepare_training
from semaim.errors import UserError  # noqa: E402
from semaim.models.vit import SIZES, VisionTransformer  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "mmseg_configs").glob("*upernet*.py"))
SCENES = "mmseg_configs/semaim_upernet_scenes.py"
SMALL = {
    "model.backbone.embed_dim": 32,
    "model.backbone.num_heads": 2,
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


def options(**more):
    """--cfg-options that make the scenes' segmentor small."""
    return flags({**SMALL, **more})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_builds_and_its_name_tells_the_truth(path):
    cfg = load_config(path)
    cfg.pop("own_data", None)  # of data that only a run names
    dense.enter(cfg)
    if path.stem.startswith("plain"):  # of any encoder: without weights by its name
        cfg.arch = "vit_tiny_patch16_224.augreg_in21k"
        settle_images(cfg, None)
        with torch.device("meta"):
            segmentor = MODELS.build(cfg.model)
        assert type(segmentor.backbone).__name__ == "PlainSegmentationViT"
        assert segmentor.decode_head.in_channels == [192] * 4 and segmentor.auxiliary_head.in_channels == 192
        return
    with torch.device("meta"):
        segmentor = MODELS.build(cfg.model)
    size = next((part for part in path.stem.split("_") if part in SIZES), "base")
    if "cifar10" in path.stem:
        size = None  # of the encoders pretrained there
    elif "camvid" in path.stem:
        size = "small"
        assert len(cfg.train_dataset.metainfo.classes) == len(cfg.train_dataset.metainfo.palette) == 11
        assert cfg.model.decode_head.num_classes == 11 == cfg.model.auxiliary_head.num_classes
    elif "scenes" in path.stem:
        size, level = ("tiny", "normal") if "easy" not in path.stem else (None, "easy")
        names = tuple(cfg.train_dataset.metainfo.classes)
        assert names == (*LEVELS[level].classes, "background") == tuple(cfg.val_dataset.metainfo.classes)
        assert len(cfg.train_dataset.metainfo.palette) == len(names) and (size or segmentor.backbone.embed_dim == 128)
        assert cfg.model.decode_head.num_classes == len(names) == cfg.model.auxiliary_head.num_classes
    else:
        assert cfg.train_cfg.max_iters == 160000 and cfg.param_scheduler.warmup * 160000 == 1499
        assert cfg.total_batch_size == 16
        assert cfg.model.decode_head.num_classes == 150
        crop = int(next((part for part in path.stem.split("_") if part.isdigit()), 512))
        assert cfg.model.backbone.img_size == crop and cfg.model.test_cfg.crop_size == (crop, crop)
        crops = [step.crop_size for step in cfg.train_dataset.pipeline if step.type == "RandomCrop"]
        assert crops == [(crop, crop)] == [cfg.model.data_preprocessor.size]
        assert cfg.test_pipeline == cfg.val_dataset.pipeline and cfg.test_pipeline[1].scale == (4 * crop, crop)
    assert not size or segmentor.backbone.embed_dim == SIZES[size]["embed_dim"]
    assert len(segmentor.backbone.out_blocks) == 4
    dense.check_positions(segmentor)
    assert cfg.total_batch_size % cfg.images_per_gpu == 0
    if "1gpu" in path.stem:  # nothing is accumulated, so that batch normalisation sees the whole batch
        assert cfg.images_per_gpu == cfg.total_batch_size and cfg.model.backbone.with_cp


def test_several_scales_and_flips_are_averaged():
    """The images that the model sees are those asked for, and the mean of their probabilities decides."""
    cfg = load_config(ROOT / "mmseg_configs/semaim_upernet_ms.py")
    dense.enter(cfg)
    assert cfg.tta and not load_config(ROOT / "mmseg_configs/semaim_upernet.py").get("tta")
    dense.averaged(cfg)
    scales, flips, load, pack = cfg.val_dataset.pipeline[1].transforms
    assert [min(step.scale) for step in scales] == [512, 512, 512, 640, 768, 896]
    assert all(max(step.scale) >= 10**6 for step in scales)  # the long side has no limit
    assert [step.prob for step in flips] == [0.0, 1.0] and all(step.keep_ratio for step in scales)
    assert load[0].type == "LoadAnnotations" and pack[0].type == "PackSegInputs"
    assert cfg.model.type == "SegTTAModel" and cfg.model.module.type == "EncoderDecoder"
    with pytest.raises(UserError, match="tta_ratios"):
        dense.averaged(load_config(ROOT / "mmdet_configs/semaim_mask_rcnn.py"))


def test_the_main_config_is_the_released_recipe():
    cfg = load_config(ROOT / "mmseg_configs/semaim_upernet.py")
    assert (cfg.total_batch_size, cfg.base_lr, cfg.base_batch_size) == (16, 1e-4, 16)
    assert cfg.optim_wrapper.type == "BFloat16OptimWrapper" and cfg.optim_wrapper.paramwise_cfg.layer_decay == 0.65
    assert cfg.optim_wrapper.optimizer == {"type": "AdamW", "betas": (0.9, 0.999), "weight_decay": 0.05}
    assert cfg.param_scheduler.type == "PolyWithWarmup" and cfg.param_scheduler.power == 1
    assert cfg.param_scheduler.warmup * 160000 == 1499 and cfg.param_scheduler.start_factor == 1e-6
    assert cfg.model.test_cfg == {"mode": "slide", "crop_size": (512, 512), "stride": (341, 341)}
    assert cfg.model.backbone.drop_path_rate == 0.1 and cfg.model.decode_head.channels == 768
    assert cfg.model.auxiliary_head.loss_decode.loss_weight == 0.4


@pytest.mark.slow
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
    assert "batch normalisation sees 2 images at a time, not the 4 of a step" in done.stdout
    assert "loaded 52 tensors" in done.stdout and "MISSING" not in done.stdout
    assert "labels of train_dataset: 12 maps, " in done.stdout and "labels of val_dataset: 3 maps, " in done.stdout
    assert "from the file: blocks.*.gamma_1 (4), blocks.*.gamma_2 (4), blocks.*.attn.rel_bias (4)\n" in done.stdout
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
    measured = results(whole)["metrics"]
    assert results(out)["metrics"] == pytest.approx(measured, abs=1e-6) and "mIoU" in measured
    for folder in (whole, out):
        assert results(folder)["classes"] == 21 and 2 <= results(folder)["classes_evaluated"] <= 21

    (parts / "results.json").unlink()  # cut in its last validation, a run does that when it is resumed
    done = tool("train.py", SCENES, *places, "--work-dir", parts, "--resume", *options())
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(parts)["metrics"] == pytest.approx(measured, abs=1e-6) and losses(parts) == again

    both = {}
    for processes in (1, 2):
        out = tmp_path / f"tta{processes}"
        arguments = [SCENES, whole / "latest.pth", processes, "--tta", "--data-root", ade, "--work-dir", out]
        done = tool("dist_test.sh", *arguments, *options())
        assert done.returncode == 0, done.stderr[-3000:]
        both[processes] = results(out)["metrics"]
        assert results(out)["scales"] == list(load_config(ROOT / SCENES).tta_ratios)
    assert both[1] == pytest.approx(both[2], abs=1e-6) and both[1].keys() == measured.keys()
    assert both[1] != measured

    image = next((ade / "images/validation").iterdir())
    done = tool("predict.py", SCENES, whole / "latest.pth", image, "--out", tmp_path / "seen", *options())
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "seen/predictions.json").read_text())
    assert (tmp_path / f"seen/{image.stem}.png").is_file() and all(1 <= one["category_id"] <= 21 for one in found)
    assert sum(int(coco_mask.area(one["segmentation"])) for one in found) == 64 * 64  # every pixel is of one class

    # A trained segmentor is no pretrained encoder of a detector, nor one of its config's segmentors.
    done = tool("test.py", "mmdet_configs/semaim_mask_rcnn_scenes.py", whole / "latest.pth")
    assert done.returncode == 2 and "does not fit this config" in done.stderr


def test_a_run_that_a_queue_stops_after_a_validation_saves_first(tmp_path):
    write_scenes(tmp_path / "scenes", 15, 64, seed=0)
    more = {"num_workers": 1, "train_cfg.max_iters": 500, "train_cfg.val_interval": 4}
    line = [sys.executable, "tools/train.py", SCENES, "--data-root", tmp_path / "scenes/ade", "--work-dir", tmp_path]
    process = subprocess.Popen(
        [*map(str, line), *options(**more, **{"default_hooks.checkpoint.interval": 500})],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert any("Iter(val) [3/3]" in line and "mIoU" in line for line in process.stdout)
    os.killpg(process.pid, signal.SIGTERM)  # reaches the loaders' workers too, those of the validation among them
    rest = process.stdout.read()
    assert process.wait(60) == 128 + signal.SIGTERM and "Traceback" not in rest, rest
    saved = read_checkpoint(tmp_path / "interrupted.pth")
    assert saved["step"] >= 4 and saved["epoch"] == saved["step"] * 4 // saved["images"]


def test_bad_input_is_one_line_before_training(tmp_path):
    write_scenes(tmp_path / "scenes", 10, 32, seed=0)
    good = tmp_path / "scenes/ade"
    first = sorted(path.stem for path in (good / "images/training").iterdir())[0]
    label, image = f"annotations/training/{first}.png", f"images/training/{first}.jpg"

    def fails(message, change, weights=None, **more):
        root = tmp_path / "broken"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(good, root)
        change(root)
        cfg = load_config(ROOT / SCENES, {**SMALL, "model.decode_head.in_channels": [32] * 4, **more})
        set_data_root(cfg, str(root))
        cfg.pretrained = weights and str(weights)
        with pytest.raises(UserError, match=message) as error:
            prepare_training(cfg, 1)
        assert "\n" not in str(error.value)

    def paint(convert):
        def change(root):
            convert(Image.open(root / label)).save(root / label)

        return change

    def value(label_map, number):
        pixels = np.array(label_map)
        pixels[0, 0] = number
        return Image.fromarray(pixels)

    def emptied(root):
        for path in (root / "images/validation").iterdir():
            path.unlink()

    fails(f"{first}.jpg has no label map", lambda root: (root / label).unlink())
    fails(
        "holds the value 22; of 21 classes, with reduce_zero_label=True, the largest is 21",
        paint(lambda m: value(m, 22)),
    )
    fails("not one channel .*mode RGB", paint(lambda m: m.convert("RGB")))
    fails(f"differ in size: {first}.png: 16 x 16, its image 32 x 32", paint(lambda m: m.resize((16, 16))))
    fails("broken image", lambda root: (root / image).write_bytes(b"no picture"))
    fails("val_dataset: no images", emptied)
    fails("no such file", lambda root: shutil.rmtree(root / "images/training"))
    fails("needs 2 images a pass", lambda root: None, images_per_gpu=1)
    fails("fewer than one batch", lambda root: None, total_batch_size=64)
    encoder = VisionTransformer(embed_dim=32, depth=4, num_heads=2, img_size=32, patch_size=8).state_dict()
    detector = {f"backbone.{name}": tensor for name, tensor in encoder.items()}
    write_checkpoint({"model": {**detector, "rpn_head.rpn_cls.weight": torch.zeros(3)}}, tmp_path / "detector.pth")
    fails("is a trained detector", lambda root: None, weights=tmp_path / "detector.pth")
    # 255 is ignored in every set, and a palette's numbers are classes as they are.
    cfg = load_config(ROOT / SCENES, {**SMALL, "model.decode_head.in_channels": [32] * 4})
    palette = Image.open(good / label).convert("P")
    palette.putpalette([3, 5, 7] * 256)
    value(palette, 255).save(good / label)
    set_data_root(cfg, str(good))
    assert prepare_training(cfg, 2).plan.images == 2


def test_slide_inference_is_the_mean_over_windows():
    cfg = load_config(ROOT / SCENES, {**SMALL, "model.decode_head.in_channels": [32] * 4})
    cfg.model.test_cfg = {"mode": "slide", "crop_size": (64, 64), "stride": (43, 43)}
    dense.enter(cfg)
    torch.manual_seed(0)
    segmentor = MODELS.build(cfg.model).eval()
    images = torch.randn(1, 3, 70, 130)
    metas = [{"img_shape": (64, 64)}]
    total, count = torch.zeros(1, 21, 70, 130), torch.zeros(70, 130)
    with torch.no_grad():
        for top in (0, 6):  # the last window of each axis is moved back into the image
            for left in (0, 43, 66):
                window = images[:, :, top : top + 64, left : left + 64]
                total[:, :, top : top + 64, left : left + 64] += segmentor.encode_decode(window, metas)
                count[top : top + 64, left : left + 64] += 1
        found = segmentor.slide_inference(images, [{"ori_shape": (70, 130), "img_shape": (70, 130)}])
    torch.testing.assert_close(found, total / count, atol=1e-5, rtol=1e-5)
