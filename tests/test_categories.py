"""COCO files whose categories are not the config's classes; other evaluators; testing where there is `val` alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import check_data, flags, one_line, results, tool

pytest.importorskip("mmdet", reason="mmdet is not installed: runs after tools/setup.sh --extras all")

from semaim.checkpoints.files import read_checkpoint  # noqa: E402
from semaim.data.coco import check_coco_file  # noqa: E402
from semaim.data.scenes import CLASSES, write_scenes  # noqa: E402
from semaim.engine import dense  # noqa: E402
from semaim.engine.config import load_config, set_data_root  # noqa: E402
from semaim.errors import UserError  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "mmdet_configs/semaim_mask_rcnn.py"
SCENES = "mmdet_configs/semaim_mask_rcnn_scenes.py"
SEGMENTOR = "mmseg_configs/semaim_upernet_scenes.py"
ENCODER = {"embed_dim": 32, "num_heads": 2, "depth": 2}
SMALL = {
    **{f"model.backbone.{key}": value for key, value in ENCODER.items()},
    "num_workers": 0,
    "total_batch_size": 4,
    "train_cfg.max_iters": 2,
    "train_cfg.val_interval": 2,
    "default_hooks.logger.interval": 1,
}
DETECTOR = {**SMALL, "model.neck.in_channels": 32}
KEPT = ("bird", "cat", "dog", "horse", "train")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Scenes of 64 pixels, as COCO's and ADE20K's folders: 12 to train on, 3 to validate."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, 15, 64, seed=0)
    return folder


def annotations(root, split="train"):
    """The content of an annotation file."""
    return json.loads((root / f"annotations/instances_{split}2017.json").read_text())


def counted(content, kept):
    """By hand: annotations of other categories, all annotations, images whose annotations are all of them."""
    names = {category["id"]: category["name"] for category in content["categories"]}
    left = [record for record in content["annotations"] if names[record["category_id"]] not in kept]
    with_kept = {r["image_id"] for r in content["annotations"] if names[r["category_id"]] in kept}
    with_any = {r["image_id"] for r in content["annotations"]}
    return len(left), len(content["annotations"]), len(with_any - with_kept)


def changed(root, out, change):
    """A copy of COCO folders whose annotation files are changed."""
    shutil.copytree(root, out)
    for split in ("train", "val"):
        content = annotations(out, split)
        change(content)
        (out / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
    return out


def test_other_categories_are_an_error_with_both_lists(written, tmp_path):
    """The scenes' 20 categories under COCO's 80 classes, as typed; what the line advises is taken."""
    root = written / "coco"
    done = tool("train.py", CONFIG, "--data-root", root, "--work-dir", tmp_path / "run")
    one_line(done, "72 of the config's 80 classes are not in it: person, bicycle,")
    assert (
        "12 of its 20 categories are not in the config: bag, ball," in done.stderr and not (tmp_path / "run").exists()
    )
    advised = done.stderr.split('--cfg-options "keep_classes=')[1].split('"')[0]
    assert advised == "[airplane,bird,car,cat,clock,dog,horse,train]"
    cfg = load_config(ROOT / CONFIG, {"keep_classes": advised[1:-1].split(",")})
    set_data_root(cfg, str(root))
    dense.enter(cfg)
    train, _ = check_data(cfg, ("train_dataset", "val_dataset"))
    assert list(train.metainfo["classes"]) == advised[1:-1].split(",")
    for head in ("bbox_head", "mask_head"):
        assert cfg.model.roi_head[head].num_classes == 8


@pytest.mark.slow
def test_chosen_classes_are_kept_and_the_rest_is_counted(written, tmp_path):
    """A training and a test by faster-coco-eval: log, results.json, checkpoint."""
    pytest.importorskip("faster_coco_eval", reason="no faster-coco-eval: runs after tools/setup.sh --extras all")
    root, run = written / "coco", tmp_path / "run"
    options = flags({**DETECTOR, "val_evaluator.type": "FasterCocoMetric", "keep_classes": f"[{','.join(KEPT)}]"})
    done = tool("train.py", SCENES, "--data-root", root, "--work-dir", run, *options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = results(run)
    assert "coco/segm_mAP" in found["metrics"] and "Traceback" not in done.stderr
    for split in ("train", "val"):
        left, whole, images = counted(annotations(root, split), KEPT)
        assert left and images
        part = {"categories": 15, "of_categories": 20, "annotations": left, "of_annotations": whole, "images": images}
        assert found["left_out"][f"{split}_dataset"] == part
        line = f"{split}_dataset: 15 of 20 categories, {left} of {whole} annotations; {images} images have no others"
        assert line in done.stdout
    saved = read_checkpoint(run / "latest.pth")
    assert saved["classes"] == list(KEPT)
    assert saved["model"]["roi_head.mask_head.conv_logits.weight"].shape[0] == len(KEPT)

    alone = tmp_path / "alone"  # the validation images alone
    (alone / "annotations").mkdir(parents=True)
    shutil.copytree(root / "val2017", alone / "val2017")
    shutil.copy(root / "annotations/instances_val2017.json", alone / "annotations")
    done = tool("test.py", SCENES, run / "latest.pth", "--data-root", alone, "--work-dir", tmp_path / "test", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    tested = results(tmp_path / "test")
    assert tested["metrics"] == pytest.approx(found["metrics"]) and tested["val_images"] == 3
    assert tested["train_images"] == found["train_images"] == saved["images"]
    assert list(tested["left_out"]) == ["val_dataset"]

    # As many other classes: nothing but the names tells that the figure would be nonsense.
    others = [name for name in CLASSES if name not in KEPT][: len(KEPT)]
    options = flags({**DETECTOR, "keep_classes": f"[{','.join(others)}]"})
    done = tool("test.py", SCENES, run / "latest.pth", "--data-root", alone, "--work-dir", tmp_path / "no", *options)
    one_line(done, f"on other classes than val_dataset has: class 0 is {KEPT[0]!r} there and {others[0]!r} here")


def test_a_segmentor_and_a_classifier_are_tested_on_val_alone(written, labelled, tmp_path):
    options = {**SMALL, "model.neck.embed_dim": 32, "model.decode_head.in_channels": [32] * 4}
    options |= {"model.backbone.depth": 4}
    options |= {"model.auxiliary_head.in_channels": 32, "model.decode_head.channels": 16}
    cfg = load_config(ROOT / SEGMENTOR, options)
    dense.enter(cfg)
    from mmengine.registry import MODELS

    torch.save({"state_dict": MODELS.build(cfg.model).state_dict()}, tmp_path / "segmentor.pth")
    alone = tmp_path / "ade"
    for part in ("images", "annotations"):
        shutil.copytree(written / "ade" / part / "validation", alone / part / "validation")
    arguments = [SEGMENTOR, tmp_path / "segmentor.pth", "--data-root", alone, "--work-dir", tmp_path / "seg"]
    done = tool("test.py", *arguments, *flags(options))
    assert done.returncode == 0, done.stderr[-3000:]
    tested = results(tmp_path / "seg")
    assert tested["val_images"] == 3 and tested["train_images"] is None and "mIoU" in tested["metrics"]

    from semaim.models.classifier import Classifier

    classifier = Classifier(img_size=32, patch_size=8, **ENCODER, num_classes=5)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    alone = tmp_path / "classes"
    shutil.copytree(labelled / "val", alone / "val", symlinks=True)
    small = {**{f"model.network.{key}": value for key, value in ENCODER.items()}, "model.network.img_size": 32}
    small |= {"num_workers": 0}
    finetune = "semaim/configs/finetune/vit_tiny_scenes.py"
    arguments = [finetune, tmp_path / "classifier.pth", "--data-root", alone, "--work-dir", tmp_path / "class"]
    done = tool("test.py", *arguments, *flags(small))
    assert done.returncode == 0, done.stderr[-3000:]
    tested = results(tmp_path / "class")
    assert tested["val_images"] == 10 and tested["train_images"] is None and "top1" in tested["metrics"]


def test_the_order_of_categories_and_the_heads_are_checked(written, tmp_path):
    """mmdet numbers classes by the file: with another order labels would have other names."""

    def fails(message, root=written / "coco", **more):
        cfg = load_config(ROOT / SCENES, more)
        set_data_root(cfg, str(root))
        dense.enter(cfg)
        with pytest.raises(UserError, match=message) as error:
            check_data(cfg, ("train_dataset", "val_dataset"))
        assert "\n" not in str(error.value)

    reverse = changed(written / "coco", tmp_path / "reverse", lambda content: content["categories"].reverse())
    fails("another order than the config's classes .'tree' where the config has 'airplane'", reverse)
    fails("another order", keep_classes=["dog", "bird"])
    fails("not sorted by id", reverse, keep_classes=["dog", "cat"])

    def twice(content):
        content["categories"][1]["name"] = "airplane"

    fails("two categories have the name 'airplane'", changed(written / "coco", tmp_path / "twice", twice))
    fails("1 of the config's 2 classes are not in it: zebra.*keep the 1 that are", keep_classes=["bird", "zebra"])
    fails("20 classes, the model's ViTDetBoxHead 3", **{"model.roi_head.bbox_head.num_classes": 3})
    fails("metric", **{"val_evaluator.metric": "segmentation"})
    # Other ids in the same order are as good.
    other = changed(
        written / "coco",
        tmp_path / "ids",
        lambda content: (
            [r.update(id=r["id"] * 7) for r in content["categories"]]
            and [r.update(category_id=r["category_id"] * 7) for r in content["annotations"]]
        ),
    )
    cfg = load_config(ROOT / SCENES)
    set_data_root(cfg, str(other))
    dense.enter(cfg)
    train, _ = check_data(cfg, ("train_dataset", "val_dataset"))
    names = {r["id"]: r["name"] for r in annotations(other)["categories"]}
    true = [names[r["category_id"]] for r in annotations(other)["annotations"] if r["image_id"] == 1]
    info = next(info for info in map(train.get_data_info, range(len(train))) if info["img_id"] == 1)
    assert sorted(CLASSES[object["bbox_label"]] for object in info["instances"]) == sorted(true)


def test_a_file_s_categories_are_counted(written):
    file, images = written / "coco/annotations/instances_val2017.json", written / "coco/val2017"
    found = check_coco_file(file, images)
    left, whole, alone = counted(annotations(written / "coco", "val"), KEPT)
    expected = {"categories": 15, "of_categories": 20, "annotations": left, "of_annotations": whole, "images": alone}
    assert found.names == list(CLASSES) and found.left_out(KEPT) == expected
    assert not any(found.left_out(CLASSES)[part] for part in ("categories", "annotations", "images"))


def test_classes_whose_names_have_blanks_come_through_a_command_line():
    cfg = load_config(ROOT / CONFIG, {"keep_classes": ["trafficlight", "dog"]})
    dense.enter(cfg)
    assert cfg.val_dataset.metainfo["classes"] == cfg.train_dataset.metainfo["classes"] == ("traffic light", "dog")
    with pytest.raises(UserError, match="it is for COCO's files, train_dataset is a BaseSegDataset"):
        dense.enter(load_config(ROOT / SEGMENTOR, {"keep_classes": ["dog"]}))
