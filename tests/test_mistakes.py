"""What users get wrong, as they type it: exit status 2, one line that names what is right, and nothing written."""

import importlib.util
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from PIL import Image

from semaim.data.decoding import load_image, load_pixels
from semaim.data.scenes import write_scenes
from semaim.engine.config import load_config, set_data_root
from semaim.errors import UserError, nearest, run

ROOT = Path(__file__).resolve().parent.parent
SEMAIM = "semaim/configs/pretrain/semaim_vit_tiny_scenes.py"
FINETUNE = "semaim/configs/finetune/vit_tiny_scenes.py"
FEW = "semaim/configs/finetune/vit_tiny_scenes_easy.py"
DETECTOR = "mmdet_configs/semaim_mask_rcnn_scenes.py"
SEGMENTOR = "mmseg_configs/semaim_upernet_scenes.py"
DVCLIVE = "visualizer.vis_backends.0.type=DVCLiveVisBackend"
needs_mm = pytest.mark.skipif(
    not (importlib.util.find_spec("mmdet") and importlib.util.find_spec("mmseg")),
    reason="mmdet and mmseg are not installed: runs after tools/setup.sh --extras all",
)


@pytest.fixture(scope="module", autouse=True)
def own_scope():
    """Types of later tests are looked for where they were."""
    yield
    DefaultScope.get_instance("after mistakes", scope_name="mmengine")


@pytest.fixture
def typed(monkeypatch, capfd):
    """A function that runs a tool in this process as its command would; exit status, output, error."""

    def call(name, *words):
        spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / f"tools/{name}.py")
        tool = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tool)
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        monkeypatch.setattr(DefaultScope, "_instance_dict", OrderedDict())  # none yet, as in a new process
        capfd.readouterr()
        return run(tool.main), *capfd.readouterr()

    return call


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """15 scenes of 32 pixels as class folders, COCO and ADE20K."""
    folder = tmp_path_factory.mktemp("mistakes")
    write_scenes(folder, 15, 32, seed=0)
    return folder


def refused(done, *messages):
    """One line, and which."""
    status, _, error = done
    assert status == 2 and error.startswith("error: ") and len(error.strip().splitlines()) == 1, error
    assert all(message in error for message in messages), error


@pytest.mark.parametrize(
    ("config", "option", "message"),
    [
        (SEMAIM, "max_epochs", "--cfg-options max_epochs: write KEY=VALUE"),
        (SEMAIM, "max_epochs=2", "unknown config key max_epochs: did you mean train_cfg.max_epochs?"),
        (SEMAIM, "train_cfg.max_epochs=abc", "train_cfg.max_epochs=abc: train_cfg.max_epochs is a number"),
        (SEMAIM, "base_lr=1e-3x", "base_lr is a number"),
        (SEMAIM, "base_lr=nan", "base_lr is nan: give a number"),
        (SEMAIM, "total_batch_size=0", "total_batch_size is 0: give a whole number, 1 or more"),
        (SEMAIM, "train_cfg.max_epochs=1.5", "train_cfg.max_epochs is 1.5: give a whole number"),
        (SEMAIM, "compile=yes", "compile is 'yes': give True, False or auto"),
        (SEMAIM, "images_per_gpu=None", "images_per_gpu is None: give a whole number, 1 or more"),
        (SEMAIM, "model.network=abc", "model.network=abc: model.network has keys: set model.network.type or another"),
        (SEMAIM, "dataset=None", "dataset has keys: set dataset.type or another"),
        (SEMAIM, "lr=1e-3", "did you mean base_lr?"),
        (SEMAIM, "optim_wrapper.optimizer.lr=1e-3", "the run sets it: set base_lr"),
        (SEMAIM, "optim_wrapper.clip_grad.max_nrm=1", "did you mean max_norm?"),
        (SEMAIM, "model.backbone.drop_path_rate=0.1", "did you mean model.network.drop_path_rate?"),
        (SEMAIM, "dataset.root.x=1", "dataset.root is 'data/scenes/classes', which has no keys"),
        (SEMAIM, DVCLIVE, "DVCLiveVisBackend needs dvclive, which is missing: pip install dvclive"),
        (FINETUNE, "num_classes=3", "did you mean model.network.num_classes?"),
        (FINETUNE, "optim_wrapper.paramwise_cfg.layr_decay=1", "did you mean layer_decay"),
        (FINETUNE, "model.network.depth=[1,(2]", "--cfg-options model.network.depth=[1,(2]: Imbalanced brackets"),
        *(
            pytest.param(*row, marks=needs_mm)
            for row in [
                (DETECTOR, "model.backbone.windw_size=3", "model.backbone.windw_size: did you mean window_size"),
                (DETECTOR, "train_cfg.max_iter=3", "unknown config key train_cfg.max_iter: did you mean max_iters"),
                (DETECTOR, "compile=yes", "compile is 'yes': give True, False or auto"),
                (DETECTOR, "max_epochs=3", "did you mean train_cfg.max_iters?"),
                (DETECTOR, "model.network.drop_path_rate=0.1", "did you mean model.backbone.drop_path_rate?"),
                (DETECTOR, "model.roi_head.bbox_head.num_clases=3", "did you mean num_classes"),
                (DETECTOR, "model.test_cfg.rcnn.score_th=0.1", "did you mean score_thr?"),
                (DETECTOR, "model.test_cfg.rcnn.nms.iou_thr=0.1", "did you mean iou_threshold"),
                (DETECTOR, "train_dataset.metainfo.clases=a,b", "did you mean classes?"),
                (DETECTOR, "train_dataset.pipeline.3.ratio_rang=1", "did you mean ratio_range"),
                (DETECTOR, "train_dataset.pipeline.30.scale=3", "train_dataset.pipeline is a list of 7: give 0 to 6"),
                (DETECTOR, "train_dataset.filter_cfg.minsize=3", "did you mean min_size"),
                (DETECTOR, "model.type=MaskRCN", "unknown type 'MaskRCN' in model: did you mean MaskRCNN?"),
                (DETECTOR, "model.backbone.img_size=128", "of 96 x 96 pixels, and the relative positions are made"),
                (DETECTOR, "model.data_preprocessor.side=128", "data_preprocessor.side makes images of 128 x 128"),
                (SEGMENTOR, "model.backbone.img_size=(128,96)", "made for 96 x 128: set model.backbone.img_size"),
                (SEGMENTOR, "model.decode_head.chanels=3", "did you mean channels"),
                (SEGMENTOR, "model.test_cfg.strid=3", "did you mean stride?"),
                (SEGMENTOR, "model.backbone.depth=abc", "model.backbone.depth is a number"),
                (SEGMENTOR, "model.backbone.size=tny", "unknown size 'tny': choose from tiny, small"),
                (SEGMENTOR, "param_scheduler.warm_up=0.1", "did you mean warmup?"),
                (SEGMENTOR, "param_scheduler=abc", "param_scheduler has keys: set param_scheduler.type or another"),
                (SEGMENTOR, "param_scheduler.1.end=50", "set param_scheduler, one dict whose warmup and milestones"),
                (SEGMENTOR, "param_scheduler.warmup=1500", "warmup is 1500: give a share of the run, from 0 to below"),
                (SEGMENTOR, "param_scheduler.type=PolyLR", "of type CosineWithWarmup, PolyWithWarmup, StepsWithWa"),
                (SEGMENTOR, "visualizer.vis_backends=abc", "vis_backends is a list: set visualizer.vis_backends.0 to"),
                (SEGMENTOR, "most_ignored=7", "most_ignored is 7: give a share, from 0 to 1"),
                (SEGMENTOR, "tta_ratios=[0,1]", "tta_ratios is [0, 1]: give a list of numbers above 0"),
                (SEGMENTOR, "model.test_cfg.mode=slide", "mode is 'slide', without crop_size and stride"),
                (SEGMENTOR, "model.test_cfg.mode=foo", "mode is 'foo': choose whole or slide"),
                (SEGMENTOR, "val_dataset=None", "val_dataset has keys: set val_dataset.type or another"),
                (SEGMENTOR, "val_evaluator=[mIoU]", "val_evaluator is ['mIoU']: give one metric, dict(type=...)"),
                (SEGMENTOR, DVCLIVE, "DVCLiveVisBackend needs dvclive, which is missing: pip install dvclive"),
            ]
        ),
    ],
)
def test_a_wrong_option_is_one_line_that_names_the_right_one(typed, data, tmp_path, config, option, message):
    folder = {DETECTOR: "coco", SEGMENTOR: "ade"}.get(config, "classes")
    words = [config, "--data-root", data / folder, "--work-dir", tmp_path / "out", "--cfg-options", option]
    if "dvclive" in message:
        assert importlib.util.find_spec("dvclive") is None, "an environment with it cannot show what is said without"
    refused(typed("train", *words, *(["2"] if option == "max_epochs" else [])), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "count", "message"),
    [
        (FINETUNE, "0", "dataset.images_per_class 0: give 1 or more, or None for all"),
        (FINETUNE, "ten", "dataset.images_per_class=ten: dataset.images_per_class is a number"),
        (FEW, "ten", "dataset.images_per_class=ten: dataset.images_per_class is a number"),
        (FEW, "1.5", "dataset.images_per_class 1.5: give 1 or more, or None for all"),
        (FEW, "99", "dataset.images_per_class 99: class "),
    ],
)
def test_a_wrong_number_of_labels_is_one_line(typed, labelled, tmp_path, config, count, message):
    words = [config, "--data-root", labelled, "--work-dir", tmp_path / "out"]
    refused(typed("train", *words, "--cfg-options", f"dataset.images_per_class={count}", "num_workers=0"), message)
    assert not (tmp_path / "out").exists()


@needs_mm
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("model = dict(backbone=dict(windw_size=3))", "key model.backbone.windw_size: did you mean window_size"),
        ("model = dict(test_cfg=dict(rcnn=dict(score_th=0.1)))", "rcnn.score_th: did you mean score_thr?"),
        ("model = dict(bckbone=dict(depth=3))", "unknown config key model.bckbone: did you mean backbone?"),
        ("train_dataset = dict(metainfo=dict(clases=('a',)))", "train_dataset.metainfo.clases: did you mean classes?"),
        ("train_dataset = dict(_delete_=True, type='RepeatDataset')", "RepeatDataset without data_root: give one data"),
        ("train_cfg = dict(max_iter=3)", "unknown config key train_cfg.max_iter: did you mean max_iters"),
        ("default_scope = 'mmdt'", "default_scope 'mmdt': task 'detection' has 'mmdet'"),
    ],
)  # fmt: skip
def test_a_wrong_key_in_a_file_is_found_before_anything_is_built(typed, tmp_path, monkeypatch, line, message):
    monkeypatch.setattr(MODELS, "build", None)
    (tmp_path / "mine.py").write_text(f"_base_ = {str(ROOT / DETECTOR)!r}\n{line}\n")
    refused(typed("train", tmp_path / "mine.py", "--work-dir", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()


@needs_mm
def test_every_tool_reads_configs_the_same_way(typed, tmp_path):
    wrong = ["--cfg-options", "model.backbone.windw_size=3"]
    hint = "unknown config key model.backbone.windw_size: did you mean window_size"
    refused(typed("test", DETECTOR, "x.pth", *wrong), hint)
    refused(typed("predict", DETECTOR, "x.pth", "x.jpg", "--out", tmp_path / "out", *wrong), hint)
    refused(typed("browse", DETECTOR, "--out", tmp_path / "out.png", *wrong), hint)
    refused(typed("sweep", DETECTOR, "--lr", 1e-3, "--work-dir", tmp_path / "out", *wrong), hint)
    words = ["predictions", "x.pth", "--config", DETECTOR, "--out", tmp_path / "out.png"]
    refused(typed("visualize", *words, *wrong), hint)
    refused(typed("train", "mmdet_configs/semaim_mask_rcn.py"), "did you mean mmdet_configs/semaim_mask_rcnn.py or")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("inside", ["", "folder"])
def test_a_work_folder_that_cannot_be_written(typed, data, tmp_path, inside):
    file = tmp_path / "file"
    file.write_text("")
    out, small = file / inside, ["--cfg-options", "total_batch_size=4", "num_workers=0"]
    reason = "Not a directory" if inside else "it is a file"
    places = ["--data-root", data / "classes", "--work-dir", out]
    refused(typed("train", SEMAIM, *places, *small), f"cannot write to the work folder {out}: {reason}")
    refused(typed("sweep", FINETUNE, "--lr", 1e-3, *places), f"cannot write to the work folder {out}")
    refused(typed("reproduce", "--scale", "quick", "--work-dir", out), str(out))
    refused(typed("test", "semaim/configs/knn/vit_tiny_scenes.py", "random", *places), f"work folder {out}: {reason}")


def test_hints_name_each_key_once():
    assert nearest("max_iter", ["max_iters", "max_iters"]) == "did you mean max_iters?"
    assert nearest("lr", ["base_lr", "seed", "base_lr"]) == "did you mean base_lr?"
    assert nearest("qqq", ["b", "a", "b"]) == "known are a, b"


# Broken images.


def broken_image(path, kind):
    """A picture file that is none, or was cut."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(b"no picture" if kind == "text" else path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("kind", ["text", "cut"])
@pytest.mark.parametrize("read", [load_image, load_pixels])
def test_a_broken_image_is_named_and_not_our_copy_of_it(tmp_path, kind, read):
    broken_image(tmp_path / "broken.jpg", kind)
    with pytest.raises(UserError, match="broken.jpg: broken or no image") as error:
        read(str(tmp_path / "broken.jpg"))
    assert "BytesIO" not in str(error.value)


@needs_mm
@pytest.mark.parametrize("kind", ["text", "cut", "label"])
def test_a_broken_image_is_named_in_detection_and_segmentation(tmp_path, typed, kind):
    from semaim.engine import dense

    write_scenes(tmp_path, 10, 32, seed=0)
    config, root = (SEGMENTOR, tmp_path / "ade") if kind == "label" else (DETECTOR, tmp_path / "coco")
    cfg = load_config(ROOT / config)
    dense.enter(cfg)
    set_data_root(cfg, str(root))
    folder = root / ("annotations" if kind == "label" else "")
    names = ("training", "validation") if kind == "label" else ("train2017", "val2017")
    files = [sorted((folder / name).iterdir()) for name in names]
    images = [
        dense.SeededImages(dense.build_data(cfg)[0], 0),
        dense.NamedImages(dense.build_data(cfg, ("val_dataset",))[0]),
    ]
    for paths, samples, keys in zip(files, images, ([(0, i) for i in range(8)], range(2)), strict=True):
        for path in paths:
            if kind == "label":
                path.write_bytes(b"no picture")
            else:
                broken_image(path, kind)
        with pytest.raises(UserError, match="|".join(path.name for path in paths)) as error:
            [samples[key] for key in keys]
        assert "BytesIO" not in str(error.value) and "\n" not in str(error.value)
    if kind != "label":
        words = [config, "--data-root", root, "--out", tmp_path / "seen.png"]
        refused(typed("browse", *words), "cannot read image")


@needs_mm
def test_an_image_that_cannot_be_predicted_leaves_the_others(tmp_path, typed):
    from semaim.engine import dense

    small = {"model.backbone.embed_dim": 32, "model.backbone.num_heads": 2, "model.neck.embed_dim": 32,
             "model.decode_head.in_channels": [32] * 4, "model.auxiliary_head.in_channels": 32,
             "model.decode_head.channels": 16, "model.auxiliary_head.channels": 16}  # fmt: skip
    cfg = load_config(ROOT / SEGMENTOR, small)
    dense.enter(cfg)
    torch.save({"model": MODELS.build(cfg.model).state_dict()}, tmp_path / "weights.pth")
    for name, size in (("thin", (1, 300)), ("narrow", (1, 90)), ("good", (40, 30)), ("dot", (1, 1))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    options = [f"{key}={str(value).replace(' ', '')}" for key, value in small.items()]
    weights = [SEGMENTOR, tmp_path / "weights.pth"]

    def predict(*names):
        images = [tmp_path / f"{name}.png" for name in names]
        return typed("predict", *weights, *images, "--out", tmp_path / "out", "--cfg-options", *options)

    for thin in ("thin", "narrow"):
        done = predict(thin, "good", "dot")
        if done[0]:  # one that can be padded may be predicted
            refused(done, f"image {tmp_path / thin}.png of 1 x ", "pixels: ", "(1 of 3 images failed; the others are")
        assert {path.name for path in (tmp_path / "out").glob("*.png")} >= {"good.png", "dot.png"}
    (tmp_path / "text.png").write_bytes(b"no picture")
    status, _, error = predict("text", "good", "missing")
    first, second = error.strip().splitlines()
    assert status == 2 and "text.png: broken or no image" in first and "missing.png: no such file" in second
