"""Pictures and JSON of what a detector finds, and of what it learns from, through the command-line tools."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import commands
import numpy as np
import pytest
import torch
from mmengine.registry import MODELS
from PIL import Image

pytest.importorskip("mmdet", reason="mmdet is not installed: runs after tools/setup.sh --extras all")

from pycocotools import mask as coco_mask  # noqa: E402
from pycocotools.coco import COCO  # noqa: E402
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights  # noqa: E402

from semaim.data.scenes import CLASSES, write_scenes  # noqa: E402
from semaim.drawing.objects import (  # noqa: E402
    Instances,
    add_legend,
    colour_of,
    draw_classes,
    draw_instances,
    enlargement,
    shares_of,
)
from semaim.engine.config import load_config  # noqa: E402
from semaim.engine.dense import build, enter  # noqa: E402
from semaim.engine.predicting import category_ids, class_names, class_results  # noqa: E402
from semaim.errors import UserError, run  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "mmdet_configs/semaim_mask_rcnn_scenes.py"
SMALL = {
    "model.backbone.embed_dim": 32,
    "model.backbone.num_heads": 2,
    "model.backbone.depth": 2,
    "model.neck.in_channels": 32,
    "model.test_cfg.rcnn.max_per_img": 10,
}
OPTIONS = ["--cfg-options", *(f"{key}={value}" for key, value in SMALL.items())]


def tool(name, *arguments):
    """A command-line tool, run for real on the CPU."""
    done = commands.tool(name, *arguments)
    return SimpleNamespace(returncode=done.returncode, out=done.stdout, err=done.stderr)


@pytest.fixture
def here(monkeypatch, capsys):
    """The same in this process, which saves the seconds of imports."""

    def start(name, *arguments):
        spec = importlib.util.spec_from_file_location(f"tools_{name[:-3]}", ROOT / "tools" / name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        status = run(module.main)
        return SimpleNamespace(returncode=status, **capsys.readouterr()._asdict())

    return start


def one_line(done, message):
    """A failure as users see it."""
    assert done.returncode == 2 and message in done.err, done.err
    assert len(done.err.strip().splitlines()) == 1, done.err


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """15 scenes to train on and 5 others, of 64 pixels."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, 20, 64, seed=0, val_fraction=0.25)
    return folder / "coco"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of a detector that was never trained, but is sure of what it finds."""
    cfg = load_config(ROOT / CONFIG, SMALL)
    enter(cfg)
    torch.manual_seed(0)
    state = build(cfg.model, MODELS, "model").state_dict()
    state["roi_head.bbox_head.fc_cls.weight"] *= 100
    state["roi_head.mask_head.conv_logits.weight"] *= 100
    path = tmp_path_factory.mktemp("model") / "model.pth"
    torch.save({"format": "semaim", "model": state, "classes": list(CLASSES)}, path)
    return path


@pytest.fixture(scope="module")
def predicted(data, weights, tmp_path_factory):
    """Predictions of the validation scenes: the folder, and what was printed."""
    out = tmp_path_factory.mktemp("predicted")
    arguments = [data / "val2017", "--score-thr", 0, "--out", out, *OPTIONS, f"val_dataset.data_root={data}"]
    done = tool("predict.py", CONFIG, weights, *arguments)
    assert done.returncode == 0, done.err
    return out, done.out


def read(out):
    """What the tool wrote."""
    return json.loads((Path(out) / "predictions.json").read_text())


# Predictions


def test_predictions_are_results_of_the_annotated_scenes(predicted, data, capsys):
    out, printed = predicted
    file = data / "annotations" / "instances_val2017.json"
    assert f"category_id: as in {file}" in printed and "5 images" in printed
    results, coco = read(out), COCO(file)
    numbers = {image["file_name"]: number for number, image in coco.imgs.items()}
    assert {line["image_id"] for line in results} == {str(path) for path in (data / "val2017").iterdir()}
    loaded = coco.loadRes([{**line, "image_id": numbers[line["file_name"]]} for line in results])
    assert len(loaded.anns) == len(results) == 50
    for line in results:
        assert coco_mask.decode(line["segmentation"]).shape == (64, 64)
        left, top, width, height = line["bbox"]
        assert 0 <= left and 0 <= top and left + width <= 64.01 and top + height <= 64.01
        assert line["category_id"] in coco.cats and 0 < line["score"] <= 1
    # What fills a box's mask lies in that box.
    line = max(results, key=lambda line: coco_mask.area(line["segmentation"]))
    left, top, width, height = coco_mask.toBbox(line["segmentation"])
    assert left >= line["bbox"][0] - 1 and left + width <= line["bbox"][0] + line["bbox"][2] + 1


def test_pictures_differ_from_the_images_where_objects_are(predicted, data):
    out, _ = predicted
    for path in (data / "val2017").iterdir():
        picture, plain = Image.open(out / f"{path.stem}.png"), Image.open(path).convert("RGB")
        scale = enlargement(plain.size)
        assert scale == 8 and picture.size == (512, 512)
        differs = (np.asarray(picture) != np.asarray(plain.resize(picture.size, Image.Resampling.BICUBIC))).any(-1)
        for line in read(out):
            if line["file_name"] == path.name:
                left, top, width, height = line["bbox"]
                box = np.array([left, top, left + width, top + height]) * scale
                left, top, right, bottom = box.round().astype(int)
                sides = differs[top, left:right], differs[top:bottom, left], differs[bottom - 1, left:right]
                assert right - left < 2 or bottom - top < 2 or all(side.mean() > 0.9 for side in sides), line


def test_threshold_names_and_broken_images(predicted, data, weights, tmp_path):
    """One run for what must hold together: no picture is written over another, and one bad file costs no other."""
    given = sorted((data / "val2017").iterdir())
    for folder, source in (("a", given[0]), ("b", given[1])):
        (tmp_path / folder).mkdir()
        shutil.copy(source, tmp_path / folder / "same.jpg")
    Image.open(given[2]).save(tmp_path / "a" / "same.png")
    Image.open(given[3]).convert("L").resize((64, 40)).save(tmp_path / "b" / "grey.png")
    turned = Image.open(given[4]).resize((64, 32))
    exif = turned.getexif()
    exif[0x0112] = 6  # held upright: to be turned by a quarter
    turned.save(tmp_path / "b" / "turned.jpg", exif=exif)
    (tmp_path / "a" / "broken.jpg").write_bytes(given[0].read_bytes()[:900])
    scores = sorted(line["score"] for line in read(predicted[0]) if line["file_name"] == given[0].name)
    threshold = (scores[4] + scores[5]) / 2
    out = tmp_path / "out"
    done = tool(
        *(
            "predict.py",
            CONFIG,
            weights,
            tmp_path / "a",
            tmp_path / "b",
            "--out",
            out,
            "--score-thr",
            threshold,
            *OPTIONS,
        )
    )
    one_line(done, f"cannot read image {tmp_path / 'a' / 'broken.jpg'}")
    assert "1 of 6 images failed" in done.err and "category_id: label + 1" in done.out
    pictures = {path.name: Image.open(path).size for path in out.glob("*.png")}
    assert pictures == {
        "a_same.png": (512, 512),
        "a_same_2.png": (512, 512),
        "b_same.png": (512, 512),
        "grey.png": (512, 320),
        "turned.png": (256, 512),
    }
    results = read(out)
    assert min(line["score"] for line in results) >= threshold
    kept = [line for line in results if line["image_id"] == str(tmp_path / "a" / "same.jpg")]
    whole = [line for line in read(predicted[0]) if line["file_name"] == given[0].name]
    assert len(kept) == 5 and [line["bbox"] for line in kept] == [line["bbox"] for line in whole[:5]]
    sizes = {line["file_name"]: line["segmentation"]["size"] for line in results}
    assert sizes["grey.png"] == [40, 64] and sizes["turned.jpg"] == [64, 32]


def test_boxes_and_masks_of_a_reduced_image_are_in_pixels_of_the_original(here, data, weights, tmp_path):
    """Each pixel is repeated four times along both sides: reduced again, the image is the small one to the bit."""
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    image = Image.open(sorted((data / "val2017").iterdir())[0]).convert("RGB").crop((0, 0, 64, 48))
    image.save(small)
    image.resize((256, 192), Image.Resampling.NEAREST).save(large)
    line = ["predict.py", CONFIG, weights, small, large, "--score-thr", 0, "--max-side", 64, "--out", tmp_path / "out"]
    assert here(*line, *OPTIONS).returncode == 0
    entries = read(tmp_path / "out")
    found = {name: [line for line in entries if line["file_name"] == name] for name in ("small.png", "large.png")}
    assert len(found["small.png"]) == len(found["large.png"]) == 10
    for one, other in zip(found["small.png"], found["large.png"], strict=True):
        assert other["bbox"] == pytest.approx([4 * side for side in one["bbox"]], abs=0.01)
        assert (other["score"], other["category_id"]) == (one["score"], one["category_id"])
        assert (one["segmentation"]["size"], other["segmentation"]["size"]) == ([48, 64], [192, 256])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--score-thr": 2}, "give a number from 0 to 1"),
        ({"--device": "abacus"}, "--device abacus"),
        ({"--device": "cuda:99"}, "--device cuda:99"),
        ({"--out": "the image's"}, "would overwrite"),
        ({"model.backbone.depth": 3}, "does not fit this config"),
        ({"test_pipeline.0.type": "Load"}, "test_pipeline, Load"),
    ],
)
def test_what_cannot_be_predicted_is_said_in_a_line(change, message, here, data, weights, tmp_path):
    image, out = tmp_path / "1.png", tmp_path / "out"
    Image.open(data / "val2017" / "000001.jpg").save(image)
    flags = {"--out": out, "--device": "cpu", **{key: value for key, value in change.items() if key[0] == "-"}}
    if "--out" in change:
        flags["--out"] = tmp_path
    options = {**SMALL, **{key: value for key, value in change.items() if key[0] != "-"}}
    line = [part for flag in flags.items() for part in flag]
    line += ["--cfg-options", *(f"{key}={value}" for key, value in options.items())]
    one_line(here("predict.py", CONFIG, weights, image, *line), message)
    assert not out.exists()


def test_a_file_with_more_than_the_model_is_refused_without_a_flag_that_is_not_there(here, data, weights, tmp_path):
    content = torch.load(weights, weights_only=True)
    content["model"]["backbone.blocks.0.ls1.gamma"] = torch.ones(32)
    torch.save(content, tmp_path / "more.pth")
    tools = {
        "predict.py": [CONFIG, tmp_path / "more.pth", data / "val2017", "--out", tmp_path / "out"],
        "visualize.py": ["predictions", tmp_path / "more.pth", "--config", CONFIG, "--out", tmp_path / "x.png"],
        "test.py": [CONFIG, tmp_path / "more.pth", "--work-dir", tmp_path / "test", "--data-root", data],
    }
    for name, words in tools.items():
        more = [f"val_dataset.data_root={data}"] if name == "visualize.py" else []
        done = here(name, *words, *OPTIONS, *more)
        one_line(done, "which does not read backbone.blocks.*.ls1.gamma")
        assert ("--allow-partial" in done.err) == (name == "test.py"), done.err


def test_other_configs_are_refused(here, weights, tmp_path):
    names = ("finetune/vit", "pretrain/semaim_vit")
    classifier, pretraining = (f"semaim/configs/{name}_tiny_scenes.py" for name in names)
    one_line(here("predict.py", classifier, weights, "x.jpg", "--out", tmp_path), "has no classifier")
    one_line(here("predict.py", pretraining, weights, "x.jpg", "--out", tmp_path), "pretraining predicts no images")


# Names and ids


def test_class_names_are_the_checkpoints_then_the_configs(weights, tmp_path):
    cfg = load_config(ROOT / CONFIG)
    enter(cfg)
    assert class_names(cfg, weights) == list(CLASSES)
    for content, names in (
        ({"classes": ["one", "two"]}, ["one", "two"]),
        ({"meta": {"dataset_meta": {"classes": ("three",)}}}, ["three"]),
        ({"meta": {"epoch": 1}}, list(CLASSES)),
    ):
        torch.save({"state_dict": {}, **content}, tmp_path / "x.pth")
        assert class_names(cfg, tmp_path / "x.pth") == names
    del cfg.val_dataset["metainfo"]
    assert class_names(cfg, tmp_path / "x.pth")[:2] == ["person", "bicycle"]


def test_category_ids(data, tmp_path):
    cfg = load_config(ROOT / CONFIG, {"val_dataset.data_root": str(tmp_path)})
    enter(cfg)
    assert category_ids(cfg, ["a", "b"]) == ([1, 2], "label + 1")
    known = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # by id
    names = [name for name in known[1:] if name != "N/A"]
    ids, origin = category_ids(cfg, names)
    assert origin.startswith("COCO's") and [known[i] for i in ids] == names
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations" / "instances_val2017.json"
    file.write_text(json.dumps({"categories": [{"id": 7, "name": "b"}, {"id": 3, "name": "a"}]}))
    assert category_ids(cfg, ["a", "b"]) == ([3, 7], f"as in {file}")
    assert category_ids(cfg, ["a", "c"]) == ([1, 2], "label + 1")
    for content in ("[]", '{"categories": 7}', '{"categories": [{"id": 7}]}', '{"categories": [[]]}', "{", "\0"):
        file.write_text(content)
        with pytest.raises(UserError, match=f"{file} is no "):
            category_ids(cfg, ["a", "b"])


# Drawing


def test_boxes_and_masks_are_drawn_where_they_are():
    mask = np.zeros((1, 500, 600), bool)
    mask[0, 220:380, 120:280] = True
    data = SimpleNamespace(get={"masks": torch.from_numpy(mask), "scores": torch.tensor([0.9])}.get)
    data.bboxes, data.labels = torch.tensor([[100.0, 200.0, 300.0, 400.0]]), torch.tensor([4])
    image = Image.new("RGB", (600, 500), (128, 128, 128))
    picture = np.asarray(draw_instances(image, Instances.of(data), CLASSES)).astype(int)
    assert picture.shape == (500, 600, 3) and np.asarray(image).max() == 128, "the image itself is left as it is"
    colour = np.array(colour_of(4))
    for y, x in ((300, 100), (300, 299), (200, 250), (399, 150), (220, 200), (300, 120)):
        assert (picture[y, x] == colour).all(), "the outlines of box and mask"
    for y, x in ((300, 98), (300, 301), (401, 150), (300, 110), (450, 500)):
        assert (picture[y, x] == 128).all(), "outside, and between box and mask"
    assert np.abs(picture[300, 200] - (0.55 * 128 + 0.45 * colour)).max() <= 1, "inside the mask"
    assert (picture[186:199, 100:150] != 128).any(-1).mean() > 0.9, "the name above the box"


def test_labels_stay_in_the_picture_and_off_one_another():
    boxes = np.array([[-5.0, -5.0, 40.0, 40.0], [560, 450, 700, 600], [0, 0, 40, 40], [30.0, 250.0, 30.0, 250.0]])
    picture = draw_instances(Image.new("RGB", (600, 500)), Instances(boxes, np.array([0, 1, 2, 300])), CLASSES)
    pixels = np.asarray(picture)
    for label in (0, 1, 2, 300):
        ys, xs = np.nonzero((pixels == colour_of(label)).all(-1))
        assert len(ys) > 300, "all of a label's ground but its letters"
    long = draw_instances(Image.new("RGB", (100, 500)), Instances(boxes[:1], np.array([0])), ["long name " * 6])
    assert (np.asarray(long)[:, -2:] == 0).all() and (np.asarray(long)[:, 85] > 0).any() and long.size == (100, 500)
    none = Instances(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0), np.zeros((0, 20, 30), bool))
    assert draw_instances(Image.new("RGB", (30, 20)), none, CLASSES).getbbox() is None


def test_class_maps_are_coloured_and_named():
    classes = np.full((500, 600), 255)
    classes[:250], classes[250:, :300] = 1, 0
    image = Image.new("RGB", (600, 500), (100, 100, 100))
    picture = draw_classes(image, classes, 2)
    pixels = np.asarray(picture).astype(int)
    assert (pixels[400, 500] == 100).all(), "unlabelled"
    for y, x, label in ((100, 100, 1), (400, 100, 0)):
        assert np.abs(pixels[y, x] - (40 + 0.6 * np.array(colour_of(label)))).max() <= 1
    shares = shares_of(classes, 2)
    assert list(shares.items()) == [(1, 0.5), (0, 0.25)]
    whole = add_legend(picture, shares, ["grass", "sky"])
    assert whole.height == 500 and whole.width > 660
    legend = np.asarray(whole)[:, 600:]
    rows = [np.nonzero((legend == colour_of(label)).all(-1))[0].mean() for label in shares]
    assert rows[0] < rows[1], "the larger first"
    many = add_legend(Image.new("RGB", (120, 90)), {label: 0.01 for label in range(150)}, [])
    assert many.height == 90 and many.width > 1000, "in columns"
    results = class_results("a/b.png", classes, [5, 9])
    assert [line["category_id"] for line in results] == [9, 5] and results[0]["file_name"] == "b.png"
    assert (coco_mask.decode(results[1]["segmentation"]) == (classes == 0)).all()


def test_colours_of_classes_are_told_apart():
    colours = [colour_of(label) for label in range(150)]
    assert len(set(colours)) == 150 and colours == [colour_of(label) for label in range(150)]
    first = np.array(colours[:21])
    apart = np.abs(first[:, None] - first[None]).sum(-1) + 999 * np.eye(21, dtype=int)
    assert apart.min() > 60


# Browsing


def test_browse_shows_augmented_images_the_same_every_time(here, data, tmp_path):
    files = [tmp_path / "1.png", tmp_path / "2.png", tmp_path / "3.png"]
    for file, images, seed in zip(files, (3, 3, 30), (0, 0, 1), strict=True):
        arguments = ["--data-root", data, "--images", images, "--out", file, "--cfg-options", f"seed={seed}"]
        # One of them in another process: the same there too.
        done = (tool if file is files[0] else here)("browse.py", CONFIG, *arguments)
        assert done.returncode == 0, done.err
        assert re.search(rf"wrote .*: {min(images, 15)} of 15 images", done.out)
    assert files[0].read_bytes() == files[1].read_bytes()
    small, large = (Image.open(file) for file in files[1:])
    assert small.width > 3 * 480 and large.width > 4 * 480 and large.height > 4 * 480
    cell = small.crop((6, 6, 486, 486)).tobytes()
    assert cell != large.crop((6, 6, 486, 486)).tobytes(), "another seed, another augmentation"
    present = {tuple(pixel) for pixel in np.asarray(large).reshape(-1, 3)[::7].tolist()}
    assert sum(colour_of(label) in present for label in range(20)) >= 8


def test_what_cannot_be_browsed_is_said_in_a_line(here, data, tmp_path):
    out = ["--out", tmp_path / "x.png"]
    one_line(here("browse.py", CONFIG, *out, "--data-root", tmp_path / "none"), "no such file")
    one_line(here("browse.py", CONFIG, "--out", tmp_path / "x.txt"), "name a .png")
    one_line(here("browse.py", CONFIG, *out, "--images", 0), "give 1 or more")
    copy = tmp_path / "coco"
    shutil.copytree(data, copy)
    (copy / "train2017" / "000001.jpg").unlink()
    one_line(here("browse.py", CONFIG, *out, "--data-root", copy), str(copy / "train2017" / "000001.jpg"))
