"""Reports that show built-in scenes name OpenMoji and its licence; others do not."""

import json
import shutil

import pytest
from PIL import Image
from test_report import checked, put

from semaim.data.scenes import MARKER
from semaim.engine.training import train
from semaim.results.attribution import CREDIT
from semaim.results.report import write_report

RESULTS = {"metrics": {"top1": 50.0}, "config": "vit_base_100e.py", "train_images": 40, "val_images": 10, "seed": 0}


def credits(folder, tmp_path):
    """How often the report of a folder says whose the emoji are."""
    write_report([folder], tmp_path / "r.html")
    return checked(tmp_path / "r.html").text.count(CREDIT)


def run_of(folder, data, picture="orders.png", **more):
    """A run's folder with a picture, measured on these images."""
    put(folder, {"results.json": {**RESULTS, "data": str(data), **more}})
    if picture:
        (folder / picture).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(folder / picture)
    return folder


def test_a_real_pretraining_on_scenes(tiny_config, scenes, tmp_path):
    assert (scenes.parent / MARKER).is_file()
    cfg = tiny_config(**{"default_hooks.pictures.interval": 1})
    train(cfg)
    assert credits(tmp_path / "run", tmp_path) == 1  # once, however many pictures

    (tmp_path / "photos").symlink_to(scenes)  # another name does not hide what they are
    other = tiny_config("other", **{"dataset.root": str(tmp_path / "photos")})
    other.default_hooks.pictures.interval = 1
    train(other)
    assert credits(tmp_path / "other", tmp_path) == 1


def test_a_real_pretraining_on_other_images(tiny_config, scenes, tmp_path):
    """The same images without the folder of scenes around them are, to the report, a folder of photographs."""
    shutil.copytree(scenes, tmp_path / "photos")
    for name in ("vit.py", "vit_tiny_scenes.py"):  # images that are there decide, not the config's name
        cfg = tiny_config(name[:-3], **{"dataset.root": str(tmp_path / "photos")})
        cfg.default_hooks.pictures.interval = 1
        train(cfg)
        put(tmp_path / name[:-3], {"results.json": {**RESULTS, "config": name, "data": str(tmp_path / "photos")}})
        assert (tmp_path / name[:-3] / "orders").is_dir()
        assert credits(tmp_path / name[:-3], tmp_path) == 0


@pytest.mark.parametrize("inside", [".", "classes", "coco", "ade", "unlabelled"])
def test_every_part_of_a_folder_of_scenes_is_known(inside, tmp_path):
    put(tmp_path / "d", {MARKER: {"generator": 1}})
    (tmp_path / "d" / inside).mkdir(exist_ok=True)
    assert credits(run_of(tmp_path / "run", tmp_path / "d" / inside), tmp_path) == 1


def test_only_where_there_are_pictures(tmp_path):
    put(tmp_path / "d", {MARKER: {"generator": 1}})
    assert credits(run_of(tmp_path / "run", tmp_path / "d", picture=None), tmp_path) == 0
    assert credits(run_of(tmp_path / "run", tmp_path / "d"), tmp_path) == 1


@pytest.mark.parametrize(
    "data, config, count",
    [
        ("data/scenes/classes", "vit_base_100e.py", 1),
        ("gone/scenes_easy/coco", "vit_base_100e.py", 1),
        ("gone", "vit_tiny_scenes_easy.py", 1),
        ("gone/imagenet", "vit_base_100e.py", 0),
        ("gone/street_scenes/train", "vit_base_100e.py", 0),
    ],
)
def test_names_decide_where_the_images_are_gone(data, config, count, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no data/ here
    assert credits(run_of(tmp_path / "run", data, config=config), tmp_path) == count


def test_predictions_on_scenes_by_a_run_on_photographs(tmp_path):
    put(tmp_path / "d", {MARKER: {"generator": 1}, "coco/val2017/1.jpg": "an image"})
    (tmp_path / "photos").mkdir()
    run = run_of(tmp_path / "run", tmp_path / "photos", picture="predictions/1.png")
    put(run, {"predictions/predictions.json": []})
    assert credits(run, tmp_path) == 0
    found = [{"image_id": str(tmp_path / "d/coco/val2017/1.jpg"), "category_id": 1, "score": 0.5}]
    (run / "predictions/predictions.json").write_text(json.dumps(found))
    assert credits(run, tmp_path) == 1


def test_pictures_of_the_opening_alone(tmp_path):
    """The pretraining that the opening shows lies outside the folders that the report is of."""
    put(tmp_path / "d", {MARKER: {"generator": 1}})
    (tmp_path / "photos").mkdir()
    pretraining = tmp_path / "elsewhere/s/pretrain"
    knn = {"task": "k-NN", "stage": "NearestNeighbours", "cfg_options": {}, "metrics": {"knn20_top1": 50.0}}
    origin = {"method": "SemAIM", "pretrain_epochs": 3, "checkpoint": str(pretraining / "e.pth")}
    run_of(tmp_path / "w/s/knn", tmp_path / "photos", picture=None, **knn, **origin)
    run_of(tmp_path / "w/r/knn", tmp_path / "photos", picture=None, **knn, method=None, checkpoint=None)
    for data, count in ((tmp_path / "photos", 0), (tmp_path / "d", 1)):
        run_of(pretraining, data)
        assert credits(tmp_path / "w", tmp_path) == count


@pytest.mark.parametrize("damaged", ["not json", "[3]", '{"data": 3}'])
def test_damaged_predictions_are_no_error(damaged, tmp_path):
    (tmp_path / "photos").mkdir()
    run = run_of(tmp_path / "run", tmp_path / "photos")
    put(run, {"p/predictions.json": damaged})
    assert credits(run, tmp_path) == 0
