"""Label maps, classifiers and videos of semaim predict, against mmseg's own metric and the figures of semaim test."""

import csv
import json
import os
import shutil

import cv2
import numpy as np
import pytest
import torch
from commands import ROOT, flags, one_line, results, tool
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from semaim.data.label_maps import verify_ade20k
from semaim.drawing.bars import Bar, add_bars
from semaim.engine.config import load_config
from semaim.errors import UserError
from semaim.registry import build_model

SEGMENTOR = "mmseg_configs/semaim_upernet_scenes.py"
CLASSIFIER = "semaim/configs/finetune/vit_tiny_scenes.py"
SMALL = {
    SEGMENTOR: {
        "model.backbone.embed_dim": 32,
        "model.backbone.num_heads": 2,
        "model.neck.embed_dim": 32,
        "model.decode_head.in_channels": "32,32,32,32",
        "model.auxiliary_head.in_channels": 32,
        "num_workers": 0,
    },
    CLASSIFIER: {
        "model.network.embed_dim": 32,
        "model.network.num_heads": 2,
        "model.network.depth": 2,
        "model.network.img_size": 32,
        "num_workers": 0,
    },
}


@pytest.fixture(scope="module")
def segmentor(tmp_path_factory):
    """A checkpoint of an untrained segmentor, with classes and colours as a training writes them."""
    pytest.importorskip("mmseg", reason="mmsegmentation is not installed: runs after tools/setup.sh --extras all")
    from mmengine.registry import MODELS

    from semaim.engine.dense import build, enter

    small = {k: [32] * 4 if k.endswith("decode_head.in_channels") else v for k, v in SMALL[SEGMENTOR].items()}
    cfg = load_config(ROOT / SEGMENTOR, small)
    enter(cfg)
    torch.manual_seed(3)
    state = build(cfg.model, MODELS, "model").state_dict()
    info = cfg.val_dataset.metainfo
    named = {"classes": list(info.classes), "palette": [[5, index, 7] for index in range(len(info.classes))]}
    path = tmp_path_factory.mktemp("segmentor") / "latest.pth"
    torch.save({"format": "semaim", "model": state, "meta": {"dataset_meta": named}}, path)
    return path


@pytest.fixture(scope="module")
def classifier(labelled, tmp_path_factory):
    """A checkpoint of an untrained classifier of the five classes."""
    cfg = load_config(ROOT / CLASSIFIER, SMALL[CLASSIFIER])
    cfg.model.network.num_classes = 5
    torch.manual_seed(1)
    state = build_model(cfg.model).network.state_dict()
    state["head.weight"] = torch.randn_like(state["head.weight"])
    path = tmp_path_factory.mktemp("classifier") / "latest.pth"
    names = sorted(folder.name for folder in (labelled / "val").iterdir())
    torch.save({"format": "semaim", "model": state, "classes": names}, path)
    return path


@pytest.fixture(scope="module")
def video(scenes, tmp_path_factory):
    """Eight frames of 32 x 46 pixels, five a second, and what they are: file and frames."""
    frames = [cv2.resize(cv2.imread(str(path)), (46, 32)) for path in sorted(scenes.rglob("*.jpg"))[:8]]
    path = tmp_path_factory.mktemp("video") / "scenes.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 5, (46, 32))
    for frame in frames:
        writer.write(frame)
    writer.release()
    return path


def predict(here, config, weights, *words):
    """The command in this process, with the options of the small network."""
    return here("predict.py", ROOT / config, weights, *words, *flags(SMALL[config]))


def read(out):
    """predictions.json of a folder."""
    return json.loads((out / "predictions.json").read_text())


# Segmentors


@pytest.mark.parametrize("averaged", [False, True])
def test_label_maps_measured_by_mmsegs_metric_give_the_figure_of_test(averaged, here, segmentor, scenes, tmp_path):
    from mmseg.datasets import BaseSegDataset
    from mmseg.datasets.transforms import LoadAnnotations
    from mmseg.evaluation import IoUMetric

    import semaim.segmentation  # noqa: F401  registers what follows

    data, tta = scenes.parent / "ade", ["--tta"] if averaged else []
    done = predict(here, SEGMENTOR, segmentor, data / "images/validation", "--out", tmp_path / "p", "--labels", *tta)
    assert done.returncode == 0, done.stderr
    test = here(
        *("test.py", ROOT / SEGMENTOR, segmentor, "--data-root", data, "--work-dir", tmp_path / "test", *tta),
        *flags(SMALL[SEGMENTOR]),
    )
    assert test.returncode == 0, test.stderr

    # The written maps take the place of the annotations, which mmseg loads as it loads those.
    cfg = load_config(ROOT / SEGMENTOR)
    info = {"classes": list(cfg.val_dataset.metainfo.classes)}
    sets = [
        BaseSegDataset(
            metainfo=info,
            data_prefix={"img_path": str(data / "images/validation"), "seg_map_path": str(maps)},
            reduce_zero_label=True,
            pipeline=[LoadAnnotations(reduce_zero_label=None)],
        )
        for maps in (tmp_path / "p/labels", data / "annotations/validation")
    ]
    metric = IoUMetric(iou_metrics=["mIoU"])
    metric.dataset_meta = sets[0].metainfo
    for index in range(len(sets[0])):
        found, truth = (torch.as_tensor(part[index]["gt_seg_map"]) for part in sets)
        metric.process({}, [{"pred_sem_seg": {"data": found}, "gt_sem_seg": {"data": truth}}])
    measured, recorded = metric.compute_metrics(metric.results), results(tmp_path / "test")
    assert measured == pytest.approx(recorded["metrics"], abs=1e-4) and measured["mIoU"] > 0
    by_class = {kind: list(figures.values()) for kind, figures in recorded["classwise"].items()}
    for kind in ("IoU", "Acc"):
        there = [value for value in by_class[kind] if value is not None]
        assert np.mean(there) == pytest.approx(measured[f"m{kind}"], abs=0.01)
    assert list(recorded["classwise"]["IoU"]) == info["classes"]
    assert sum(value is not None for value in by_class["IoU"]) == recorded["classes_evaluated"]

    written = Image.open(next((tmp_path / "p/labels").iterdir()))
    values = np.unique(np.asarray(written))
    assert written.mode == "P" and values.min() >= 1
    assert all(written.getpalette()[3 * v : 3 * v + 3] == [5, v - 1, 7] for v in values.tolist()), "the checkpoint's"
    for part in ("images", "annotations"):
        shutil.copytree(data / part / "training", tmp_path / "verified" / part / "training")
    shutil.copytree(data / "images/validation", tmp_path / "verified/images/validation")
    shutil.copytree(tmp_path / "p/labels", tmp_path / "verified/annotations/validation")
    assert not verify_ade20k(tmp_path / "verified", classes=21).problems


def test_results_of_a_reduced_image_are_in_pixels_of_the_original(here, segmentor, scenes, tmp_path):
    image = tmp_path / "large.png"
    Image.open(sorted(scenes.rglob("*.jpg"))[0]).resize((150, 90)).save(image)
    done = predict(here, SEGMENTOR, segmentor, image, "--out", tmp_path / "p", "--labels", "--max-side", 60)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "p/labels/large.png").size == (150, 90)
    assert {tuple(entry["segmentation"]["size"]) for entry in read(tmp_path / "p")} == {(90, 150)}


def test_values_follow_the_data_sets_rule_and_other_classes_are_refused(here, segmentor, scenes, tmp_path):
    image = sorted(scenes.rglob("*.jpg"))[0]
    out = ["--out", tmp_path / "p", "--labels"]
    options = {**SMALL[SEGMENTOR], "val_dataset.reduce_zero_label": False}
    line = ["predict.py", ROOT / SEGMENTOR, segmentor, image, *out]
    assert here(*line, *flags(SMALL[SEGMENTOR])).returncode == 0
    one = np.asarray(Image.open(tmp_path / f"p/labels/{image.stem}.png")).copy()
    assert here(*line, *flags(options)).returncode == 0
    assert (np.asarray(Image.open(tmp_path / f"p/labels/{image.stem}.png")) == one - 1).all()
    content = torch.load(segmentor, weights_only=True)
    content["meta"]["dataset_meta"]["classes"][2:4] = content["meta"]["dataset_meta"]["classes"][3:1:-1]
    torch.save(content, tmp_path / "other.pth")
    one_line(predict(here, SEGMENTOR, tmp_path / "other.pth", image, *out), "was trained on other classes")


def test_values_of_own_data_are_those_of_its_label_maps(here, scenes, tmp_path):
    pytest.importorskip("mmseg", reason="mmsegmentation is not installed: runs after tools/setup.sh --extras all")
    from mmengine.registry import MODELS

    from semaim.engine import own_data
    from semaim.engine.dense import build, enter

    data, photo = tmp_path / "data", sorted(scenes.rglob("*.jpg"))[0]
    for folder in ("images", "labels"):
        (data / folder).mkdir(parents=True)
    for name in "abcd":
        shutil.copyfile(photo, data / f"images/{name}.jpg")
        Image.fromarray(np.full(Image.open(photo).size[::-1], 7, np.uint8)).save(data / f"labels/{name}.png")
    described = f"root: {data}\nclasses: {{7: car, 8: car, 3: road}}\npalette: [[9, 0, 0], [0, 9, 0]]\n"
    (tmp_path / "data.yaml").write_text(described)
    cfg = load_config(ROOT / SEGMENTOR, {**SMALL[SEGMENTOR], "model.decode_head.in_channels": [32] * 4})
    own_data.set_data(cfg, None, str(tmp_path / "data.yaml"))
    cfg.dump(tmp_path / "config.py")  # as a training writes it
    enter(cfg)
    torch.save({"format": "semaim", "model": build(cfg.model, MODELS, "model").state_dict(),
                "meta": {"dataset_meta": {"classes": ["car", "road"]}}}, tmp_path / "latest.pth")  # fmt: skip

    line = ["predict.py", tmp_path / "config.py", tmp_path / "latest.pth", data / "images", "--labels", "--out"]
    one_line(here(*line, data), "labels/a.png, which is of no earlier prediction: name another folder")
    assert (np.asarray(Image.open(data / "labels/a.png")) == 7).all()
    shutil.rmtree(data / "labels")  # what is not predicted need not be there
    for _ in range(2):  # what it has written itself it writes again
        done = here(*line, tmp_path / "p")
        assert done.returncode == 0, done.stderr
    written = [Image.open(path) for path in (tmp_path / "p/labels").iterdir()]
    assert len(written) == 4 and {value for one in written for value in np.unique(one).tolist()} <= {3, 7}
    assert written[0].getpalette()[9:12] == [0, 9, 0] and written[0].getpalette()[21:24] == [9, 0, 0]


# Classifiers


def test_a_path_that_is_no_utf_8_is_predicted_and_named(classifier, labelled, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    shutil.copyfile(sorted(labelled.rglob("val/*/*.*"))[0], folder / os.fsdecode(b"caf\xe9.png"))
    done = tool("predict.py", CLASSIFIER, classifier, folder, "--out", tmp_path / "p", *flags(SMALL[CLASSIFIER]))
    assert done.returncode == 0, done.stderr
    assert b"/caf\xe9.png," in (tmp_path / "p/predictions.csv").read_bytes()
    assert os.fsencode(read(tmp_path / "p")[0]["image_id"]).endswith(b"caf\xe9.png")


def test_top_class_is_right_as_often_as_test_says(here, classifier, labelled, tmp_path):
    options = flags(SMALL[CLASSIFIER])
    done = here("predict.py", ROOT / CLASSIFIER, classifier, labelled / "val", "--out", tmp_path / "p", *options)
    assert done.returncode == 0, done.stderr
    line = ["--data-root", labelled, "--work-dir", tmp_path / "test"]
    assert here("test.py", ROOT / CLASSIFIER, classifier, *line, *options).returncode == 0
    entries = read(tmp_path / "p")
    assert len(entries) == 10 == len(list((tmp_path / "p").glob("*.png")))
    right = [entry["classes"][0]["class"] == entry["image_id"].split("/")[-2] for entry in entries]
    assert 100 * np.mean(right) == pytest.approx(results(tmp_path / "test")["metrics"]["top1"])
    for entry in entries:
        assert sum(it["probability"] for it in entry["classes"]) == pytest.approx(1, abs=1e-5), "five of five classes"
        values = [it["probability"] for it in entry["classes"]]
        assert values == sorted(values, reverse=True)
    rows = list(csv.DictReader((tmp_path / "p/predictions.csv").read_text().splitlines()))
    assert [row["image"] for row in rows] == [entry["image_id"] for entry in entries]
    assert [row["class_5"] for row in rows] == [entry["classes"][4]["class"] for entry in entries]


def test_flags_of_other_models_are_refused(here, classifier, labelled, tmp_path):
    for flag, whose in (("--labels", "segmentors"), ("--tta", "segmentors"), ("--score-thr=0.5", "detectors")):
        done = predict(here, CLASSIFIER, classifier, labelled / "val", "--out", tmp_path / "p", flag)
        one_line(done, f"{flag.partition('=')[0]} is for {whose}")
    for flag, value in (("--max-side", 0), ("--every", 0)):
        done = predict(here, CLASSIFIER, classifier, labelled / "val", "--out", tmp_path / "p", flag, value)
        one_line(done, "give 1 or more")
    assert not (tmp_path / "p").exists()


# Videos


def test_a_video_is_predicted_frame_by_frame(here, classifier, video, tmp_path):
    done = predict(here, CLASSIFIER, classifier, video, "--out", tmp_path / "p", "--every", 3)
    assert done.returncode == 0, done.stderr
    assert [(entry["frame"], entry["time"]) for entry in read(tmp_path / "p")] == [(0, 0.0), (3, 0.6), (6, 1.2)]
    capture = cv2.VideoCapture(str(tmp_path / "p/scenes.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 3 and capture.get(cv2.CAP_PROP_FPS) == pytest.approx(
        5 / 3, abs=1e-3
    )
    # A frame is predicted as the image that it is.
    frames = cv2.VideoCapture(str(video))
    Image.fromarray(frames.read()[1][..., ::-1]).save(tmp_path / "first.png")
    assert predict(here, CLASSIFIER, classifier, tmp_path / "first.png", "--out", tmp_path / "i").returncode == 0
    assert read(tmp_path / "i")[0]["classes"] == read(tmp_path / "p")[0]["classes"]


def test_a_segmentors_video_and_damaged_ones(here, segmentor, video, tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    content = video.read_bytes()
    (folder / "a.avi").write_bytes(content)
    (folder / "b.avi").write_bytes(content[: len(content) // 2])
    (folder / "c.mp4").write_bytes(content[:9])
    (folder / "d.mov").write_bytes(b"")
    line = ["predict.py", SEGMENTOR, segmentor, folder, "--out", folder / "out", "--labels", *flags(SMALL[SEGMENTOR])]
    done = tool(*line)
    assert done.returncode == 2
    errors = done.stderr.strip().splitlines()
    assert [error.partition(".")[0][-1] for error in errors] == ["b", "c", "d"] and "3 of 4 videos failed" in errors[-1]
    assert "damaged" in errors[0] and "cannot read video" in errors[1] and "cannot read video" in errors[2]
    assert "a.mp4: 8 frames at 5 a second" in done.stdout
    names = sorted(path.name for path in (folder / "out").iterdir())
    assert names == ["a.mp4", "b.mp4", "labels", "predictions.json"], "nothing is left half written"
    maps = sorted(path.name for path in (folder / "out/labels").glob("a_*"))
    assert maps == [f"a_{frame:06d}.png" for frame in range(8)]
    assert Image.open(folder / "out/labels/a_000000.png").size == (46, 32)
    line[1] = ROOT / SEGMENTOR
    again = here(*line)  # what it has written is not predicted again
    assert "of 4 videos" in again.stderr


# Pictures


@given(
    st.tuples(st.integers(1, 900), st.integers(1, 900)),
    st.lists(st.tuples(st.text(max_size=80), st.floats(0, 1)), max_size=30),
    st.integers(1, 5),
)
def test_bars_have_one_size_whatever_the_shares(size, rows, least):
    picture, names = Image.new("RGB", size, "navy"), ["a", "a long name of a class"]
    bars = [Bar(name.replace("\n", " "), share, (200, 0, 0)) for name, share in rows]
    drawn = add_bars(picture, bars, names, least)
    assert drawn.size == add_bars(picture, [], names, least).size
    assert (np.asarray(drawn)[: size[1], : size[0]] == np.asarray(picture)).all(), "the picture stays as it is"
    assert drawn.width > size[0] and drawn.height >= size[1]


def test_a_bar_is_as_long_as_its_share():
    drawn = np.asarray(add_bars(Image.new("RGB", (400, 300), "white"), [Bar("road", 0.25, (200, 0, 0))]))
    red = (drawn == (200, 0, 0)).all(-1).any(0)
    rail = ((drawn == (200, 0, 0)) | (drawn == (232, 232, 232))).all(-1).any(0)
    assert red.sum() / rail.sum() == pytest.approx(0.25, abs=0.02)


def test_a_prediction_that_is_interrupted_keeps_what_it_has(classifier, labelled, tmp_path):
    from semaim.prediction.predictor import Found, Item
    from semaim.prediction.writing import Results

    item, found = Item("x.jpg"), Found(Image.new("RGB", (1, 1)), [{"image_id": "x.jpg"}], "", row=["a", "1"])
    with pytest.raises(KeyboardInterrupt), Results(tmp_path, ["class_1", "probability_1"]) as written:
        written.add(item, found)
        assert not (tmp_path / "predictions.json").exists()
        raise KeyboardInterrupt
    assert read(tmp_path) == [{"image_id": "x.jpg"}]
    assert (tmp_path / "predictions.csv").read_text().split() == [
        "image,frame,time,class_1,probability_1",
        "x.jpg,,,a,1",
    ]
    with pytest.raises(UserError, match="cannot write to --out"):
        Results(tmp_path / "none")
