"""Linear and k-NN segmentation with a frozen encoder, through the tools and compared with plain forms of them."""

import json
import shutil
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from commands import flags, losses, one_line, results, tool
from safetensors.torch import save_file
from torch import nn

pytest.importorskip("mmseg", reason="mmsegmentation is not installed: runs after tools/setup.sh --extras all")

from mmengine.registry import MODELS  # noqa: E402

from semaim.checkpoints.files import read_checkpoint, write_checkpoint  # noqa: E402
from semaim.data.scenes import write_scenes  # noqa: E402
from semaim.encoders.networks import FrozenViT  # noqa: E402
from semaim.engine import dense  # noqa: E402
from semaim.engine.config import load_config, set_data_root  # noqa: E402
from semaim.engine.encoders import settle_images  # noqa: E402
from semaim.engine.testing import prepare_test  # noqa: E402
from semaim.engine.training import prepare_training  # noqa: E402
from semaim.errors import UserError  # noqa: E402
from semaim.models.vit import SIZES, VisionTransformer  # noqa: E402
from semaim.outcomes import read_outcomes  # noqa: E402
from semaim.segmentation.metrics import CountedIoUMetric  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "mmseg_configs"
CONFIGS = sorted([*FOLDER.glob("*_linear*.py"), *FOLDER.glob("*_knn*.py")])
LINEAR, KNN = "mmseg_configs/semaim_linear_scenes.py", "mmseg_configs/semaim_knn_scenes.py"
SMALL = {"model.backbone.embed_dim": 32, "model.backbone.num_heads": 2, "num_workers": 0}
TRAINED = {
    **SMALL, "model.decode_head.in_channels": 32, "total_batch_size": 4, "base_lr": 0.1, "train_cfg.max_iters": 4,
    "train_cfg.val_interval": 4, "default_hooks.checkpoint.interval": 2, "default_hooks.logger.interval": 1,
    "log_processor.window_size": 1, "default_hooks.checkpoint.keep": 0,
}  # fmt: skip
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def ade(tmp_path_factory):
    """12 training and 3 validation scenes of 64 pixels."""
    folder = tmp_path_factory.mktemp("frozen") / "scenes"
    write_scenes(folder, 15, 64, seed=0)
    return folder / "ade"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """An encoder's file, and the encoder: four blocks of 32 channels, patches of 8, images of 32 pixels."""
    torch.manual_seed(0)
    encoder = VisionTransformer(embed_dim=32, depth=4, num_heads=2, img_size=32, patch_size=8)
    for name, parameter in encoder.named_parameters():
        if name != "pos_embed":
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("encoder") / "encoder.pth"
    write_checkpoint({"model": encoder.state_dict()}, path)
    return path, encoder.eval()


def whole_mean(folder):
    """mIoU in percent from what a run kept for each image."""
    kept = read_outcomes(folder)
    intersections, unions = kept.scores["mIoU"].astype(float).sum(axis=0).T
    return 100 * (intersections[unions > 0] / unions[unions > 0]).mean(), kept


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_builds_and_its_name_tells_the_truth(path):
    cfg = load_config(path)
    dense.enter(cfg)
    kind, size = ("linear" if "linear" in path.stem else "knn"), "base"
    assert cfg.task == f"{kind}_segmentation" and cfg.train_dataset.data_root == cfg.val_dataset.data_root
    if path.stem.startswith("plain"):
        cfg.arch, size = "vit_tiny_patch16_224.augreg_in21k", None
        settle_images(cfg, None)
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    assert type(model.backbone) is FrozenViT and not any(p.requires_grad for p in model.backbone.parameters())
    width, classes = model.backbone.embed_dim, len(cfg.val_dataset.get("metainfo", {}).get("classes", range(150)))
    size = {"camvid": "small", "scenes": None}.get(path.stem.split("_")[2] if path.stem.count("_") > 1 else "", size)
    assert size is None or path.stem.startswith("plain") or width == SIZES[size]["embed_dim"]
    (resize,) = (step for step in cfg.test_pipeline if step.type == "Resize")
    assert cfg.test_pipeline == cfg.val_dataset.pipeline
    if kind == "knn":
        assert cfg.train_dataset.pipeline == cfg.val_dataset.pipeline and not resize.keep_ratio
        assert resize.scale == (cfg.model.backbone.img_size,) * 2
        return
    head = model.decode_head
    blocks = 4 if "4blocks" in path.stem else 1
    assert head.channels == blocks * width and head.num_classes == classes and head.dropout is None
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"decode_head.{part}.{one}" for part in ("bn", "conv_seg") for one in ("weight", "bias")}
    assert cfg.base_lr * cfg.total_batch_size / cfg.base_batch_size == pytest.approx(
        4e-3 if "easy" in path.stem else 1e-3
    )


def test_the_linear_config_is_dinov2s():
    """dinov2_vitb14_ade20k_linear_config.py, in mmseg 0.x's terms; of the data what differs from mmseg's ADE20K."""
    cfg = load_config(FOLDER / "semaim_linear.py")
    assert cfg.optim_wrapper.optimizer == {"type": "AdamW", "betas": (0.9, 0.999), "weight_decay": 0.0001}
    assert (cfg.base_lr, cfg.total_batch_size, cfg.train_cfg.max_iters) == (0.001, 8 * 2, 40000)
    assert cfg.optim_wrapper.paramwise_cfg == {"decay": "all"} and cfg.optim_wrapper.type == "DeferredOptimWrapper"
    assert cfg.model.test_cfg == {"mode": "slide", "crop_size": (512, 512), "stride": (341, 341)}
    steps = {step.pop("type"): step for step in cfg.train_dataset.pipeline}
    assert steps["RandomResize"] == {"scale": (99999999, 512), "ratio_range": (0.5, 2.0), "keep_ratio": True}
    assert steps["RandomCrop"] == {"crop_size": (512, 512), "cat_max_ratio": 0.75}
    assert steps["RandomFlip"] == {"prob": 0.5} and "PhotoMetricDistortion" in steps
    assert cfg.val_dataset.pipeline[1].scale == (99999999, 512)


def test_the_head_is_batch_normalisation_and_a_linear_classifier():
    cfg = load_config(FOLDER / "semaim_linear_4blocks.py", {"model.decode_head.in_channels": [6, 6, 6, 6]})
    dense.enter(cfg)
    head = MODELS.build(cfg.model.decode_head).train()
    maps = [torch.randn(3, 6, 4, 5) * 3 + 1 for _ in range(4)]
    rows = torch.cat(maps, dim=1).permute(0, 2, 3, 1).reshape(-1, 24)
    plain = nn.Sequential(nn.BatchNorm1d(24), nn.Linear(24, 150)).train()
    plain[1].load_state_dict({"weight": head.conv_seg.weight.flatten(1), "bias": head.conv_seg.bias})
    for mode in (True, False):  # statistics of the batch, then the running ones
        expected = plain.train(mode)(rows).view(3, 4, 5, 150).permute(0, 3, 1, 2)
        torch.testing.assert_close(head.train(mode)(maps), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_maps_are_the_patch_tokens_after_the_final_norm(pretrained):
    _, encoder = pretrained
    own = FrozenViT(size="tiny", embed_dim=32, depth=4, num_heads=2, patch_size=8, img_size=32, last_blocks=2).train()
    own.encoder.load_state_dict(encoder.state_dict())
    assert own.training and not own.encoder.training
    images = torch.randn(2, 3, 32, 32)
    (third, last), expected = own(images), encoder(images)[:, 1:]
    torch.testing.assert_close(last.flatten(2).transpose(1, 2), expected, atol=1e-6, rtol=1e-5)
    assert third.shape == (2, 32, 4, 4) and not torch.allclose(third, last)
    odd = own(torch.randn(1, 3, 30, 43))
    assert odd[0].shape == (1, 32, 4, 6)  # stretched to whole patches
    described = {"family": "timm", "arch": "vit_small_patch14_reg4_dinov2", "args": {"depth": 5}}
    theirs = FrozenViT(described, img_size=56, patch_size=None, last_blocks=4)
    images = torch.randn(1, 3, 56, 56)
    found = theirs.encoder.vit.get_intermediate_layers(images, n=4, reshape=True, norm=True)  # DINOv2's own call
    for one, other in zip(theirs(images), found, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(UserError, match="last_blocks is 6: the encoder has 5 blocks"):
        FrozenViT(described, img_size=56, patch_size=None, last_blocks=6)
    sam = {"family": "sam", "arch": "samvit_base_patch16", "args": {"depth": 2, "embed_dim": 48, "num_heads": 2}}
    neck = FrozenViT(sam)
    assert neck.embed_dim == 256 == neck(torch.randn(1, 3, 1024, 1024))[0].shape[1]
    with pytest.raises(UserError, match="last block alone"):
        FrozenViT(sam, last_blocks=2)(torch.randn(1, 3, 64, 64))


def train(ade, path, folder, *more):
    """Four steps of linear segmentation on this suite's own encoder."""
    line = [LINEAR, "--data-root", ade, "--pretrained", path, "--work-dir", folder, *more]
    done = tool("train.py", *line, *flags(TRAINED))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def check_outcomes(folder, ade):
    """What a run kept for each image makes the mIoU that it reports."""
    found, kept = whole_mean(folder)
    assert found == pytest.approx(results(folder)["metrics"]["mIoU"], abs=0.006)
    images = sorted((ade / "images/validation").iterdir())
    assert kept.names.tolist() == [f"images/validation/{path.name}" for path in images]


def test_patches_of_a_prediction_are_what_most_of_their_pixels_are():
    """Against a loop over patches and pixels; label maps of another size than the network's input, 255 ignored."""
    metric, classes = CountedIoUMetric(patch_size=8, iou_metrics=["mIoU"]), 5
    metric.dataset_meta = {"classes": [f"class {index}" for index in range(classes)]}
    draw, confusion, pixels = np.random.default_rng(0), np.zeros((classes, classes), int), []
    for _ in range(4):
        labels, found = draw.integers(0, classes, (48, 60)), draw.integers(0, classes, (48, 60))
        found[:16] = labels[:16]
        labels[draw.random((48, 60)) < 0.4] = 255
        labels[:16, :15] = 255  # the first patch has no label
        for row, column in np.ndindex(3, 4):  # 24 x 32 pixels of input, patches of 8
            most = [Counter(one[16 * row : 16 * row + 16, 15 * column : 15 * column + 15].ravel().tolist()) for one in
                    (labels, found)]  # fmt: skip
            most[0].pop(255, None)
            if most[0]:
                confusion[tuple(max(sorted(count), key=count.get) for count in most)] += 1
        maps = {"gt_sem_seg": labels, "pred_sem_seg": found}
        sample = {key: {"data": torch.from_numpy(value)[None]} for key, value in maps.items()}
        metric.process({}, [{**sample, "img_shape": (24, 32)}])
        pixels.append((labels, found))
    figures = metric.evaluate(4)
    assert figures["patch_mIoU"] == pytest.approx(mean_iou(confusion)[0], abs=0.006)
    assert figures["patch_aAcc"] == pytest.approx(100 * np.diag(confusion).sum() / confusion.sum(), abs=0.006)
    plain = CountedIoUMetric(iou_metrics=["mIoU"])
    plain.dataset_meta = metric.dataset_meta
    for labels, found in pixels:
        sample = {"gt_sem_seg": {"data": torch.from_numpy(labels)}, "pred_sem_seg": {"data": torch.from_numpy(found)}}
        plain.process({}, [sample])
    assert plain.evaluate(4).items() <= figures.items() and np.array_equal(plain.areas, metric.areas)


def test_linear_segmentation_trains_the_head_alone(ade, pretrained, tmp_path):
    path, encoder = pretrained
    log = train(ade, path, tmp_path)
    assert "loaded 54 tensors" in log and "757 weights in 4" in log and "NOT LOADED" not in log  # 2 x 32 + 21 x 33
    first, last = (read_checkpoint(tmp_path / f"iter_{step}.pth")["model"] for step in (2, 4))
    for name, tensor in encoder.state_dict().items():
        if name != "pos_embed":  # resampled when it was loaded
            assert torch.equal(last[f"backbone.encoder.{name}"], tensor), name
        assert torch.equal(last[f"backbone.encoder.{name}"], first[f"backbone.encoder.{name}"]), name
    assert not torch.equal(last["decode_head.conv_seg.weight"], first["decode_head.conv_seg.weight"])
    assert 0 < results(tmp_path)["metrics"]["patch_mIoU"] < 100 and "by patches" in log
    assert results(tmp_path)["task"] == "linear segmentation" and losses(tmp_path).keys() == {1, 2, 3, 4}
    check_outcomes(tmp_path, ade)


@pytest.mark.slow
def test_linear_segmentation_resumes_to_the_bit_and_is_measured(ade, pretrained, tmp_path):
    path, _ = pretrained
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(ade, path, whole)
    parts.mkdir()
    shutil.copy(whole / "iter_2.pth", parts)
    (parts / "latest.pth").symlink_to("iter_2.pth")
    train(ade, path, parts, "--resume")
    last, again = (read_checkpoint(folder / "iter_4.pth")["model"] for folder in (whole, parts))
    assert losses(parts) == {step: loss for step, loss in losses(whole).items() if step > 2}
    assert all(torch.equal(again[name], tensor) for name, tensor in last.items())

    done = tool("test.py", LINEAR, whole / "latest.pth", "--data-root", ade, "--work-dir", tmp_path / "test",
                *flags({**SMALL, "model.decode_head.in_channels": 32}))  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = results(tmp_path / "test")["metrics"]
    assert found == results(whole)["metrics"] and "patch_mIoU" in found
    check_outcomes(tmp_path / "test", ade)

    done = tool("test.py", LINEAR, whole / "latest.pth", "--data-root", ade, "--work-dir", tmp_path / "mmseg",
                *flags({**SMALL, "model.decode_head.in_channels": 32, "val_evaluator.type": "IoUMetric"}))  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(tmp_path / "mmseg")["metrics"] == {name: found[name] for name in ("mIoU", "mAcc", "aAcc")}


@torch.no_grad()
def slow_knn(encoder, ade, classes=21, size=128, k=30, temperature=0.02):
    """Confusion matrices (annotated, predicted) of pixels and patches, over all patches, in fp64 and one by one."""

    def read(split):
        for image in sorted((ade / "images" / split).iterdir()):
            pixels = cv2.resize(cv2.imread(str(image)), (size, size), interpolation=cv2.INTER_LINEAR)[..., ::-1]
            normal = torch.tensor((pixels / 255 - MEAN) / STD).permute(2, 0, 1)[None]
            labels = (
                cv2.imread(str(ade / "annotations" / split / f"{image.stem}.png"), cv2.IMREAD_UNCHANGED).astype(int) - 1
            )
            tokens = encoder(normal)[0, 1:]
            side = len(labels) // (size // 8)  # pixels of the label map per patch
            cut = labels.reshape(size // 8, side, size // 8, side).transpose(0, 2, 1, 3).reshape(-1, side * side)
            counts = np.stack([(cut == label).sum(axis=1) for label in range(classes)], axis=1)
            yield F.normalize(tokens, dim=1), labels, counts

    bank = list(read("training"))
    features = torch.cat([part[0] for part in bank])
    labels = torch.tensor(np.concatenate([part[2] / part[2].sum(axis=1, keepdims=True) for part in bank]))
    pixels, patches = np.zeros((classes, classes), int), np.zeros((classes, classes), int)
    for tokens, truth, counts in read("validation"):
        similarity, index = (tokens @ features.T).sort(dim=1, descending=True)
        weights = (similarity[:, :k] / temperature).softmax(dim=1)
        found = (weights[..., None] * labels[index[:, :k]]).sum(dim=1)
        np.add.at(patches, (counts.argmax(axis=1), found.argmax(dim=1).numpy()), 1)
        maps = F.interpolate(found.T.reshape(1, classes, size // 8, -1), truth.shape, mode="bilinear")[0].argmax(dim=0)
        np.add.at(pixels, (truth, maps.numpy()), 1)
    return pixels, patches


def mean_iou(confusion):
    """In percent, over the classes that occur or are found."""
    right, union = np.diag(confusion), confusion.sum(axis=0) + confusion.sum(axis=1) - np.diag(confusion)
    return 100 * (right[union > 0] / union[union > 0]).mean(), right, union


def test_knn_segmentation_is_that_of_an_explicit_form(ade, pretrained, tmp_path):
    path, encoder = pretrained
    options = {**SMALL, "evaluation.memory_size": "None"}
    done = tool("test.py", KNN, path, "--data-root", ade, "--work-dir", tmp_path, *flags(options))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "bank: 3,072 patches of 12 images" in done.stdout
    resized = FrozenViT(size="tiny", embed_dim=32, depth=4, num_heads=2, patch_size=8, img_size=128).encoder
    state = dict(encoder.state_dict())
    state["pos_embed"] = timm.layers.resample_abs_pos_embed(state["pos_embed"], (16, 16), (4, 4), num_prefix_tokens=1)
    resized.load_state_dict(state)
    pixels, patches = (mean_iou(confusion) for confusion in slow_knn(resized.double().eval(), ade))
    found = results(tmp_path)
    assert found["metrics"]["mIoU"] == pytest.approx(pixels[0], abs=0.1)
    assert found["metrics"]["patch_mIoU"] == pytest.approx(patches[0], abs=0.1)
    mean, kept = whole_mean(tmp_path)
    assert mean == pytest.approx(found["metrics"]["mIoU"], abs=0.006) and len(kept.names) == 3
    right, union = kept.scores["mIoU"].sum(axis=0).T  # fp16 features change few pixels of 3 x 64 x 64
    assert np.abs(right - pixels[1]).sum() < 60 and np.abs(union - pixels[2]).sum() < 60
    assert (found["task"], found["val_images"], found["bank"]) == ("k-NN segmentation", 3, 3072)


def test_what_cannot_be_measured_is_one_line(ade, tmp_path):
    def fails(message, prepare, options=(), **more):
        cfg = load_config(ROOT / KNN, {**SMALL, **dict(options)})
        set_data_root(cfg, str(ade))
        cfg.update(more)
        with pytest.raises(UserError, match=message) as error:
            prepare(cfg)
        assert "\n" not in str(error.value)

    fails("memory_size is 20: give 30 or more", lambda cfg: prepare_test(cfg, "random"), {"evaluation.memory_size": 20})
    fails("k is 0 and", lambda cfg: prepare_test(cfg, "random"), {"evaluation.k": 0})
    fails("--tta is for segmentors", lambda cfg: prepare_test(cfg, "random"), tta=True)
    fails("measures a checkpoint .k-NN segmentation.", lambda cfg: prepare_training(cfg, 1))
    one_line(tool("test.py", KNN, tmp_path / "none.pth", "--data-root", ade, "--work-dir", tmp_path), "none.pth")


@pytest.mark.slow
def test_two_processes_measure_what_one_does(ade, pretrained, tmp_path):
    for processes in (1, 2):
        line = [KNN, pretrained[0], processes, "--data-root", ade, "--work-dir", tmp_path / str(processes)]
        done = tool("test.py", *line, *flags({**SMALL, "evaluation.memory_size": 600}))
        assert done.returncode == 0 and "bank: 600 patches" in done.stdout, done.stderr[-3000:]
    one, two = (results(tmp_path / name) for name in ("1", "2"))
    assert one["metrics"] == two["metrics"] and two["device"].startswith("2 x")
    first, second = (read_outcomes(tmp_path / name) for name in ("1", "2"))
    assert np.array_equal(first.scores["mIoU"], second.scores["mIoU"]) and list(first.names) == list(second.names)


@pytest.mark.slow
def test_any_encoder_is_measured(ade, tmp_path):
    """timm's: DINOv2's kind with registers, whose patches of 14 become patches of 8."""
    folder = tmp_path / "dino"
    arch, args = "vit_small_patch14_reg4_dinov2", {"depth": 2, "img_size": 56}
    vit = timm.create_model(arch, pretrained=False, num_classes=0, **args)
    folder.mkdir()
    save_file(vit.state_dict(), folder / "model.safetensors")
    cfg = {"input_size": [3, 56, 56], "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 1.0}
    (folder / "config.json").write_text(json.dumps({"architecture": arch, "model_args": args, "pretrained_cfg": cfg}))
    source = f"local-dir:{folder}"
    done = tool("test.py", "mmseg_configs/plain_knn_scenes.py", source, "--data-root", ade, "--work-dir",
                tmp_path / "knn", *flags({"num_workers": 0}))  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(tmp_path / "knn")["backbone"] == arch and results(tmp_path / "knn")["mean"] == [0.5] * 3
    steps = {name: value for name, value in TRAINED.items() if "model" not in name}
    config, run = "mmseg_configs/plain_linear_scenes.py", tmp_path / "linear"
    done = tool("train.py", config, "--pretrained", source, "--data-root", ade, "--work-dir", run, *flags(steps))
    assert done.returncode == 0, done.stderr[-3000:]
    first, last = (read_checkpoint(run / f"iter_{step}.pth")["model"] for step in (2, 4))
    assert all(torch.equal(first[name], last[name]) for name in first if name.startswith("backbone."))
    image = next((ade / "images/validation").iterdir())
    done = tool("predict.py", config, run / "latest.pth", image, "--out", tmp_path / "seen")
    assert done.returncode == 0 and (tmp_path / f"seen/{image.stem}.png").is_file(), done.stderr[-3000:]
