"""Detectors: every config builds and is what it says; they train, resume and are measured through the tools."""

import copy
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import flags, losses, results, tool

pytest.importorskip("mmdet", reason="mmdet is not installed: runs after tools/setup.sh --extras all")

from mmengine.config import Config  # noqa: E402
from mmengine.registry import DATASETS, MODELS, PARAM_SCHEDULERS  # noqa: E402

from semaim import checkpoints  # noqa: E402
from semaim.checkpoints.files import read_checkpoint, write_checkpoint  # noqa: E402
from semaim.data.scenes import CLASSES, LEVELS, write_scenes  # noqa: E402
from semaim.engine import dense  # noqa: E402
from semaim.engine.config import load_config, set_data_root  # noqa: E402
from semaim.engine.encoders import settle_images  # noqa: E402
from semaim.engine.optim import layer_depths  # noqa: E402
from semaim.engine.schedule import milestones_in_steps, plan_batch, schedule_of  # noqa: E402
from semaim.engine.training import prepare_training  # noqa: E402
from semaim.errors import UserError  # noqa: E402
from semaim.models.vit import SIZES  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "mmdet_configs").glob("*.py"))
SCENES = "mmdet_configs/semaim_mask_rcnn_scenes.py"
SMALL = {
    "model.backbone.embed_dim": 32,
    "model.backbone.num_heads": 2,
    "model.backbone.depth": 2,
    "model.backbone.pretrain_img_size": 32,
    "model.neck.in_channels": 32,
    "num_workers": 0,
    "total_batch_size": 4,
    "train_cfg.max_iters": 4,
    "train_cfg.val_interval": 4,
    "default_hooks.checkpoint.interval": 2,
    "default_hooks.logger.interval": 1,
    "log_processor.window_size": 1,
}


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """COCO folders of 12 training and 3 validation scenes of 64 pixels."""
    folder = tmp_path_factory.mktemp("coco") / "scenes"
    write_scenes(folder, 15, 64, seed=0)
    return folder / "coco"


def options(**more):
    """--cfg-options that make the scenes' detector small."""
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
            detector = MODELS.build(cfg.model)
        assert type(detector.backbone).__name__ == "PlainViTDet" and cfg.model.neck.in_channels == 192
        assert list(cfg.model.data_preprocessor.mean) == [127.5] * 3
        return
    with torch.device("meta"):
        detector = MODELS.build(cfg.model)
    size = next((part for part in path.stem.split("_") if part in SIZES), "base")
    if "cifar10" in path.stem:
        size = None  # of the encoders pretrained there
    elif "overfit" in path.stem:
        size = "tiny"
        assert cfg.model.roi_head.bbox_head.num_classes == cfg.model.roi_head.mask_head.num_classes == 80
        assert "classes" not in cfg.train_dataset.metainfo and cfg.train_dataset.ann_file == cfg.val_dataset.ann_file
    elif "scenes" in path.stem:
        size, level = ("tiny", "normal") if "easy" not in path.stem else (None, "easy")
        classes = tuple(cfg.train_dataset.metainfo.classes)
        assert classes == LEVELS[level].classes == tuple(cfg.val_dataset.metainfo.classes)
        heads = cfg.model.roi_head.bbox_head, cfg.model.roi_head.mask_head
        assert [head.num_classes for head in heads] == [len(classes)] * 2
        assert size or detector.backbone.embed_dim == 128
    else:
        quarter = SIZES[size]["depth"] // 4
        windows = [block.attn.window for block in detector.backbone.blocks]
        assert [i for i, window in enumerate(windows) if not window] == [quarter * (q + 1) - 1 for q in range(4)]
        assert set(windows) == {0, cfg.model.backbone.window_size}
    assert not size or detector.backbone.embed_dim == SIZES[size]["embed_dim"]
    epochs = re.search(r"_(\d+)ep", path.stem)
    if not epochs and not {"huge", "1gpu", "scenes", "overfit", "cifar10"} & set(path.stem.split("_")):
        epochs = re.search(r"(\d+)", "100")
    if epochs:
        assert round(cfg.train_cfg.max_iters * cfg.total_batch_size / 118000) == int(epochs[1])
    assert cfg.total_batch_size % cfg.images_per_gpu == 0
    assert detector.data_preprocessor.side == cfg.model.backbone.img_size  # what relative positions are made for
    dense.check_positions(detector)
    if cfg.param_scheduler.type == "StepsWithWarmup":
        assert list(cfg.param_scheduler.milestones) == pytest.approx([0.889, 0.963], abs=0.001) or size in (
            "tiny",
            None,
        )


def test_the_main_config_is_vitdets_recipe():
    cfg = load_config(ROOT / "mmdet_configs/semaim_mask_rcnn.py")
    assert (cfg.total_batch_size, cfg.base_lr, cfg.base_batch_size, cfg.train_cfg.max_iters) == (64, 1e-4, 64, 184375)
    assert cfg.optim_wrapper.optimizer == {"type": "AdamW", "betas": (0.9, 0.999), "weight_decay": 0.1}
    assert cfg.optim_wrapper.paramwise_cfg.layer_decay == 0.7 and cfg.model.backbone.drop_path_rate == 0.1
    assert milestones_in_steps(cfg.param_scheduler.milestones, 184375) == [163889, 177546]
    assert cfg.param_scheduler.warmup * 184375 == pytest.approx(250) and cfg.param_scheduler.start_factor == 0.001
    assert cfg.optim_wrapper.type == "BFloat16OptimWrapper" and "clip_grad" not in cfg.optim_wrapper
    kinds = [step["type"] for step in cfg.train_dataset.pipeline]
    assert kinds.index("RandomFlip") < kinds.index("ResizeScale") < kinds.index("FixedSizeCrop")
    resize = cfg.train_dataset.pipeline[kinds.index("ResizeScale")]
    assert resize["scale"] == (1024, 1024) and resize["ratio_range"] == (0.1, 2.0)
    roi = cfg.model.roi_head
    assert roi.bbox_head.type == "ViTDetBoxHead" and roi.bbox_head.norm_cfg.type == "LN2d"
    assert roi.mask_head.num_convs == 4 and cfg.model.rpn_head.num_convs == 2
    large = load_config(ROOT / "mmdet_configs/semaim_mask_rcnn_large.py")
    assert large.model.backbone.drop_path_rate == 0.4 and large.optim_wrapper.paramwise_cfg.layer_decay == 0.8


def test_the_older_recipe_trains_on_four_maps():
    """The config of Li et al. 2021 with a small encoder."""
    cfg = load_config(ROOT / "mmdet_configs/semaim_mask_rcnn_li2021.py")
    assert (cfg.base_lr, cfg.total_batch_size, cfg.optim_wrapper.paramwise_cfg.layer_decay) == (8e-5, 64, 1.0)
    assert cfg.param_scheduler.from_start and cfg.train_cfg.max_iters == 184375
    assert cfg.model.backbone.window_size == 16
    small = {"size": "tiny", "embed_dim": 64, "num_heads": 2, "depth": 4, "out_blocks": (0, 1, 2, 3), "img_size": 128}
    cfg.model.backbone.update(small)
    cfg.model.neck[0].channels, cfg.model.neck[1].in_channels = 64, [64] * 4
    cfg.model.data_preprocessor.side = 128
    dense.enter(cfg)
    torch.manual_seed(0)
    detector = MODELS.build(Config(cfg.model.to_dict()))
    levels = detector.extract_feat(torch.randn(1, 3, 128, 128))
    assert [tuple(level.shape[1:]) for level in levels] == [(256, side, side) for side in (32, 16, 8, 4, 2)]
    # Each level follows from the map of its own depth: the last block's weights move the coarser levels alone (an FPN
    # passes down, so the finest sees all), the norm of the first map's branch only the finest.
    grads = torch.autograd.grad(levels[3].sum(), detector.backbone.blocks[3].mlp.fc2.weight, retain_graph=True)[0]
    assert grads.abs().sum() > 0
    finest = torch.autograd.grad(levels[3].sum(), detector.neck[0][0][0].weight, allow_unused=True)[0]
    assert finest is None


def test_faster_coco_eval_gives_pycocotools_figures(coco):
    """Random predictions around the true objects, of right and wrong classes, with a crowd among the objects."""
    pytest.importorskip("faster_coco_eval", reason="no faster-coco-eval: runs after tools/setup.sh --extras all")
    from mmdet.registry import METRICS
    from pycocotools import mask as rle

    dense.enter(load_config(ROOT / SCENES))
    file = coco / "annotations/instances_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"][1]["iscrowd"] = 1
    crowded = coco / "annotations/crowded.json"
    crowded.write_text(json.dumps(content))
    generator = np.random.default_rng(0)
    found = {}
    for name in ("CocoMetric", "FasterCocoMetric"):
        metric = METRICS.build({"type": name, "ann_file": str(crowded), "metric": ["bbox", "segm"]})
        metric.dataset_meta = {"classes": CLASSES}
        found[name] = metric
    api = found["CocoMetric"]._coco_api
    categories = api.get_cat_ids(cat_names=CLASSES)
    results = []
    for image in content["images"]:
        boxes, labels, masks = [], [], []
        for record in (a for a in content["annotations"] if a["image_id"] == image["id"]):
            for _ in range(4):
                x, y, width, height = np.array(record["bbox"]) + generator.normal(0, 3, 4)
                boxes.append([x, y, x + max(width, 1), y + max(height, 1)])
                right = categories.index(record["category_id"])
                labels.append(right if generator.random() < 0.8 else generator.integers(len(CLASSES)))
                shifted = np.roll(api.annToMask(record), generator.integers(-3, 4, 2), (0, 1))
                masks.append(rle.encode(np.asfortranarray(shifted)))
        scores = generator.random(len(boxes))
        prediction = {"img_id": image["id"], "bboxes": np.array(boxes).reshape(-1, 4), "labels": np.array(labels)}
        results.append(({}, {**prediction, "scores": scores, "mask_scores": scores, "masks": masks}))
    theirs, ours = (found[name].compute_metrics(results) for name in ("CocoMetric", "FasterCocoMetric"))
    assert {name: theirs[name] for name in ours} == ours and 0.1 < ours["segm_mAP"] < 0.9
    assert len(ours) == 12 and ours["bbox_mAP_s"] != ours["segm_mAP_s"]
    assert not found["FasterCocoMetric"].compute_metrics(
        [
            ({}, {**r, "bboxes": r["bboxes"][:0], "labels": [], "scores": [], "masks": [], "mask_scores": []})
            for _, r in results
        ]
    )


def test_a_misspelt_key_is_named():
    with pytest.raises(UserError, match="unknown config key totl_batch_size: did you mean total_batch_size"):
        load_config(ROOT / SCENES, {"totl_batch_size": 8})
    with pytest.raises(UserError, match="unknown config key model.backbone.windw_size: did you mean window_size"):
        load_config(ROOT / SCENES, {"model.backbone.windw_size": 8})


def test_layer_decay_reaches_the_backbone_and_not_the_heads():
    cfg = load_config(ROOT / SCENES)
    dense.enter(cfg)
    depth_of = layer_depths(MODELS.build(cfg.model))
    assert depth_of("backbone.patch_embed.proj.weight")[0] == 0
    assert depth_of("backbone.blocks.3.attn.rel_pos_h") == (4, 6)
    for name in ("neck.levels.p2.output.weight", "roi_head.mask_head.conv_logits.weight"):
        assert depth_of(name) == (5, 6)


def test_samples_follow_from_seed_epoch_and_index(coco):
    cfg = load_config(ROOT / SCENES)
    dense.enter(cfg)
    set_data_root(cfg, str(coco))
    one, two = (dense.SeededImages(DATASETS.build(cfg.train_dataset), 0) for _ in range(2))
    same = one[(1, 3)]["inputs"]
    two[(0, 0)]
    assert torch.equal(two[(1, 3)]["inputs"], same)
    other = two[(2, 3)]["inputs"]
    assert other.shape != same.shape or not torch.equal(other, same)


@pytest.mark.slow
def test_a_pretrained_encoder_trains_on_two_processes_resumes_and_is_measured(coco, pretrained, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    places = ["--data-root", coco, "--pretrained", pretrained]
    done = tool(
        "dist_train.sh", SCENES, 2, *places, "--work-dir", whole, *options(**{"default_hooks.checkpoint.keep": 0})
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Warning" not in done.stdout + done.stderr
    report = [line.strip() for line in done.stdout[done.stdout.index("loaded 27 tensors") :].splitlines()]
    assert "new, not from the file: blocks.*.attn.rel_pos_h (2), blocks.*.attn.rel_pos_w (2)" in report
    assert "MISSING" not in done.stdout
    assert read_checkpoint(whole / "latest.pth")["classes"] == list(CLASSES)

    parts.mkdir()
    shutil.copy(whole / "iter_2.pth", parts)
    (parts / "latest.pth").symlink_to("iter_2.pth")
    done = tool("dist_train.sh", SCENES, 2, *places, "--work-dir", parts, "--resume", *options())
    assert done.returncode == 0, done.stderr[-3000:]
    first, again = losses(whole), losses(parts)
    assert list(again) == [3, 4] and list(first) == [1, 2, 3, 4]
    assert all(again[step] == first[step] for step in again)

    measured = results(whole)["metrics"]
    assert "coco/segm_mAP" in measured
    for processes in (1, 2):
        out = tmp_path / f"test{processes}"
        arguments = [SCENES, whole / "latest.pth", processes, "--data-root", coco, "--work-dir", out]
        done = tool("dist_test.sh", *arguments, *options())
        assert done.returncode == 0, done.stderr[-3000:]
        assert "Warning" not in done.stdout + done.stderr
        assert results(out)["metrics"] == pytest.approx(measured, abs=1e-6)
    # The checkpoint flows on: into another detector, and into the other tools.
    found = checkpoints.read(whole / "latest.pth")
    assert found.sizes["depth"] == 2 and "blocks.0.attn.rel_pos_h" in found.state


def test_a_check_leaves_the_model_of_the_config_as_it_is(coco):
    # mmdet writes a detector's train_cfg into the config of its heads. A checkpoint with that cannot be resumed.
    cfg = load_config(ROOT / SCENES, SMALL)
    set_data_root(cfg, str(coco))
    before = copy.deepcopy(cfg.model.to_dict())
    prepare_training(cfg, 1)
    assert cfg.model.to_dict() == before


def test_schedules_count_optimizer_steps():
    cfg = load_config(ROOT / "mmdet_configs/semaim_mask_rcnn.py")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    plan = plan_batch(64, 8, 4, cfg.base_lr, 64)
    assert plan.accumulation == 2
    settings = schedule_of(cfg.param_scheduler, plan, cfg.train_cfg.max_iters)
    schedule = PARAM_SCHEDULERS.build({**settings, "optimizer": optimizer})
    optimizer.step()
    for step, rate in ((0, 0.001), (250, 1), (163888, 1), (163889, 0.1), (177545, 0.1), (177546, 0.01)):
        for iteration in (2 * step, 2 * step + 1):
            schedule.seek(iteration)
            assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-12), (step, iteration)


def test_bad_input_is_one_line_before_training(coco, pretrained, tmp_path):
    def fails(message, root=coco, weights=None, **more):
        cfg = load_config(ROOT / SCENES, {**SMALL, **more})
        set_data_root(cfg, str(root))
        cfg.pretrained = weights and str(weights)
        with pytest.raises(UserError, match=message) as error:
            prepare_training(cfg, 1)
        assert "\n" not in str(error.value)

    def broken(change):
        """A copy of the data whose training annotations are changed."""
        root = tmp_path / "broken"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(coco, root)
        file = root / "annotations/instances_train2017.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
        return root

    fails("nowhere/annotations/instances_train2017.json", root=tmp_path / "nowhere")
    unreadable = broken(lambda content: None)
    (unreadable / "annotations/instances_train2017.json").write_text("{")
    fails("instances_train2017.json", root=unreadable)
    fails("lost.jpg", root=broken(lambda content: content["images"][0].update(file_name="lost.jpg")))
    fails("box", root=broken(lambda content: content["annotations"][0].update(bbox=[0, 0, 900, 10])))
    fails("categor", root=broken(lambda content: content["annotations"][0].update(category_id=99)))
    fails("annotations", root=broken(lambda content: content.update(annotations=[])))
    write_checkpoint({"model": {"conv1.weight": torch.zeros(3)}}, tmp_path / "resnet.pth")
    fails("no ViT encoder in", weights=tmp_path / "resnet.pth")
    segmentor = {f"backbone.{name}": tensor for name, tensor in read_checkpoint(pretrained)["model"].items()}
    write_checkpoint({"model": {**segmentor, "decode_head.conv_seg.weight": torch.zeros(3)}}, tmp_path / "seg.pth")
    fails("is a trained segmentor", weights=tmp_path / "seg.pth")
    fails("the model a ViT", weights=pretrained, **{"model.backbone.depth": 3})
    fails("fewer than one batch of 64", total_batch_size=64)
    done = tool("test.py", SCENES, pretrained, "--data-root", coco, "--work-dir", tmp_path / "out", *options())
    assert done.returncode == 2 and "does not fit this config" in done.stderr, done.stderr[-2000:]
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_levels_have_their_strides_on_an_oblong_image():
    """The ViT-B detector with a single block."""
    cfg = load_config(ROOT / "mmdet_configs/semaim_mask_rcnn.py", {"model.backbone.depth": 1})
    cfg.model.backbone.global_blocks = (0,)
    dense.enter(cfg)
    detector = MODELS.build(Config(cfg.model.to_dict()))
    with torch.no_grad():
        levels = detector.extract_feat(torch.randn(1, 3, 256, 320))
    assert [tuple(level.shape[-2:]) for level in levels] == [(64, 80), (32, 40), (16, 20), (8, 10), (4, 5)]
