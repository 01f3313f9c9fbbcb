"""Checks of data sets: the scenes are clean, and each kind of damage is found alone and named."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import tool
from PIL import Image

from semaim.data.coco import check_coco_file
from semaim.data.coco_masks import runs_of
from semaim.data.findings import Report
from semaim.data.label_maps import verify_ade20k
from semaim.data.scenes import BACKGROUND, write_scenes
from semaim.data.verify import verify_coco
from semaim.errors import UserError

mask = pytest.importorskip(
    "pycocotools.mask", reason="pycocotools is not installed: runs after tools/setup.sh --extras all"
)

# pycocotools 2.0.11 with NumPy 2, once a mask.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
ROOT = Path(__file__).resolve().parent.parent
SIZE = 32


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify") / "scenes"
    write_scenes(folder, 20, SIZE, seed=0)
    return folder


@pytest.fixture
def folder(clean, tmp_path):
    """A copy to damage."""
    shutil.copytree(clean, tmp_path / "data")
    return tmp_path / "data"


def pair(folder):
    return folder / "coco/annotations/instances_train2017.json", folder / "coco/train2017"


def edit(folder, change):
    """Change the training annotations, given as a dict."""
    file = pair(folder)[0]
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def run(*arguments):
    return tool("verify_dataset.py", *arguments)


def test_scenes_are_clean(clean):
    for split, count in (("train", 16), ("val", 4)):
        ann, images = clean / f"coco/annotations/instances_{split}2017.json", clean / f"coco/{split}2017"
        check_coco_file(ann, images)
        report = verify_coco(ann, images, workers=2)
        assert not report.problems and not report.warnings
        assert f"{count} images" in str(report) and str(report).endswith("nothing wrong")
    report = verify_ade20k(clean / "ade", BACKGROUND, workers=2)
    few = {"classes that never occur", "validated on, but never trained"}  # in 20 scenes
    assert not report.problems and report.warnings.keys() <= few
    assert "training: 16 pairs" in str(report) and "validation: 4 pairs" in str(report)


# COCO: each change damages the first annotation, which lies in the first image.

SQUARE = {"bbox": [4, 6, 10, 8], "area": 80}
POLYGON = [4, 6, 14, 6, 14, 14, 4, 14]
WHOLE = SIZE * SIZE


def first(**values):
    return lambda document: document["annotations"][0].update(values)


def image(**values):
    return lambda document: document["images"][0].update(values)


def double(key):
    return lambda document: document[key].append(document[key][0])


COCO = {
    "unknown image": (first(image_id=99), "annotation of an unknown image", "names image 99"),
    "unknown category": (first(category_id=99), "annotation of an unknown category", "names category 99"),
    "image twice": (double("images"), "id used twice in 'images'", "id 1"),
    "annotation twice": (double("annotations"), "id used twice in 'annotations'", "id 1"),
    "category twice": (double("categories"), "id used twice in 'categories'", "id 1"),
    "no box": (first(bbox=None), "damaged record in 'annotations'", "id 1: no valid bbox"),
    "no id": (first(id=None), "damaged record in 'annotations'", "number 1 has no id"),
    "three numbers": (first(bbox=[1, 2, 3]), "damaged box", "[1, 2, 3]"),
    "negative": (first(bbox=[9, 9, -3, 4], segmentation=[POLYGON]), "damaged box", "000001.jpg: [9, 9, -3, 4]"),
    "not finite": (first(bbox=[9, 9, float("nan"), 4], segmentation=[POLYGON]), "damaged box", "nan"),
    "outside": (
        first(bbox=[25, 2, 9, 4], area=30, segmentation=[POLYGON]),
        "box outside its image",
        "[25, 2, 9, 4] in 32 x 32 pixels",
    ),
    "no area": (first(area=None), "damaged area", "None"),
    "negative area": (first(area=-1), "damaged area", "-1"),
    "two points": (first(**SQUARE, segmentation=[[4, 6, 14, 14]]), "polygon of fewer than 3 points", "[4, 6, 14, 14]"),
    "no points": (first(**SQUARE, segmentation=[[]]), "polygon of fewer than 3 points", "[]"),
    "odd": (first(**SQUARE, segmentation=[POLYGON[:-1]]), "polygon of an odd number of coordinates", ": 7"),
    "polygon outside": (
        first(**SQUARE, segmentation=[POLYGON, [4, 6, 14, 6, 14, 40]]),
        "polygon outside its image",
        "32 x 32 pixels",
    ),
    "words": (first(**SQUARE, segmentation=[["a", "b"]]), "damaged polygon", "no list of numbers"),
    "text": (first(**SQUARE, segmentation="polygon"), "damaged segmentation", "neither polygons nor run lengths"),
    "rle size": (
        first(segmentation={"size": [16, 32], "counts": [500, 12]}),
        "size of run lengths differs from the image's",
        "[16, 32]",
    ),
    "rle short": (
        first(segmentation={"size": [32, 32], "counts": [500, 12]}),
        "damaged run lengths",
        "do not add up to 32 x 32",
    ),
    "rle negative": (
        first(segmentation={"size": [32, 32], "counts": [WHOLE + 5, -5]}),
        "damaged run lengths",
        "annotation 1",
    ),
    "rle text": (first(segmentation={"size": [32, 32], "counts": "zzzz"}), "damaged run lengths", "annotation 1"),
    "rle empty": (first(segmentation={"size": [32, 32], "counts": [WHOLE]}), "empty mask", "annotation 1"),
    "image size": (
        image(width=40),
        "image size differs from the listed one",
        "000001.jpg is 32 x 32, listed as 40 x 32",
    ),
    "image without width": (image(width=0), "damaged record in 'images'", "id 1: no valid width"),
}
BREAKS_ALONE = {  # what else an edit makes wrong
    "image without width": {"annotation of an unknown image"},
    "image size": {"size of run lengths differs from the image's"},
}


@pytest.mark.parametrize("name", COCO)
def test_damage_in_coco_annotations_is_named(folder, name):
    change, kind, example = COCO[name]
    edit(folder, change)
    report = verify_coco(*pair(folder), workers=1)
    assert set(report.problems) - BREAKS_ALONE.get(name, set()) == {kind} and not report.warnings, str(report)
    assert report.problems[kind].count == 1 and example in report.problems[kind].examples[0]
    assert kind in str(report)


@pytest.mark.parametrize(
    "change, kind",
    [
        (first(bbox=[4, 6, 10, 0], area=0, segmentation=[POLYGON]), "object under a pixel, training leaves it out"),
        (first(**SQUARE, segmentation=[]), "no segmentation, so that masks cannot be learned"),
        (first(id=0), "id 0, with which validation is refused: COCO's metric takes it for no match"),
        (first(**{**SQUARE, "area": 300}, segmentation=[POLYGON]), "area larger than the box"),
        (first(bbox=[0, 0, 3, 3], area=9), "mask and box differ"),
    ],
)
def test_what_a_training_survives_is_a_warning(folder, change, kind):
    edit(folder, change)
    report = verify_coco(*pair(folder), workers=1)
    assert set(report.warnings) == {kind} and not report.problems, str(report)
    check_coco_file(*pair(folder))


def test_the_id_0_is_refused_where_predictions_are_measured(folder):
    """COCO's metric counts a prediction that matches it as wrong; any other id is fine."""
    ann, images = pair(folder)
    found = {}
    for number in (0, -1, 7000):
        edit(folder, first(id=number))
        with contextlib.redirect_stdout(io.StringIO()):
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval

            truth = COCO(str(ann))
            wanted = ("image_id", "category_id", "bbox")
            same = [{"score": 1.0, **{key: it[key] for key in wanted}} for it in truth.dataset["annotations"]]
            evaluation = COCOeval(truth, truth.loadRes(same), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        found[number] = evaluation.stats[0]
        check_coco_file(ann, images)
        if number == 0:
            with pytest.raises(UserError, match="the id 0, which COCO's metric .*: number"):
                check_coco_file(ann, images, measured=True)
        else:
            check_coco_file(ann, images, measured=True)
    assert found[-1] == found[7000] == pytest.approx(1) and found[0] < 0.999


def test_a_pixel_over_the_edge_and_compressed_masks_are_fine(folder):
    def change(document):
        document["annotations"][0].update(bbox=[-1, 6, 34, 27], area=80, segmentation=[[-1, 6, 33, 6, 33, 33]])
        for record in document["annotations"][1:]:
            packed = mask.frPyObjects(record["segmentation"], SIZE, SIZE)
            record["segmentation"] = {"size": [SIZE, SIZE], "counts": packed["counts"].decode()}

    edit(folder, change)
    report = verify_coco(*pair(folder), workers=1)
    assert not report.problems and not report.warnings, str(report)


def test_compressed_runs_are_those_of_pycocotools():
    generator = np.random.default_rng(0)
    for threshold in (0.01, 0.5, 0.999):
        pixels = np.asfortranarray(generator.random((60, 80)) < threshold, dtype=np.uint8)
        flat = np.concatenate([[0], pixels.ravel(order="F"), [2]])
        edges = np.flatnonzero(np.diff(flat))
        packed = mask.encode(pixels)["counts"].decode()
        assert runs_of(packed).tolist() == np.diff([0, *edges]).tolist()
        assert runs_of(packed + "o").size == 0  # says that more follows


def broken(path):
    path.write_bytes(path.read_bytes()[:-200])


def turned(path):
    """Twice as wide as high, to be turned by EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (SIZE, SIZE // 2)).save(path, exif=exif)


@pytest.mark.parametrize(
    "damage, kind, example",
    [
        (Path.unlink, "image listed but absent", "000002.jpg is not in"),
        (broken, "broken image", "000002.jpg: image file is truncated"),
        (lambda path: path.write_bytes(b"text"), "broken image", "000002.jpg: cannot identify"),
        (lambda path: path.write_bytes(b""), "broken image", "000002.jpg"),
        (lambda path: Image.new("L", (40, 30)).save(path), "image size differs from the listed one", "is 40 x 30"),
        (turned, "image size differs from the listed one", "is 16 x 32, listed as 32 x 32"),
    ],
)
def test_damaged_coco_images_are_named(folder, damage, kind, example):
    damage(pair(folder)[1] / "000002.jpg")
    report = verify_coco(*pair(folder), workers=2)
    assert set(report.problems) == {kind} and report.problems[kind].count == 1, str(report)
    assert example in report.problems[kind].examples[0]


def test_images_without_annotations_and_in_subfolders(folder):
    def change(document):
        document["annotations"] = [record for record in document["annotations"] if record["image_id"] > 2]
        for record in document["images"][:4]:
            record["file_name"] = f"deep/{record['file_name']}"

    edit(folder, change)
    images = pair(folder)[1]
    (images / "deep").mkdir()
    for number in (1, 2, 3, 4):
        (images / f"{number:06d}.jpg").rename(images / f"deep/{number:06d}.jpg")
    check_coco_file(*pair(folder))
    report = verify_coco(*pair(folder), workers=1)
    assert not report.problems and "images without annotations: 2 (training leaves them out)" in report.summary


def test_the_first_five_of_a_kind_are_shown():
    report = Report("name")
    for number in range(7):
        report.problem("kind", f"example {number}")
    report.warning("other", "example")
    text = str(report)
    assert "problem: kind: 7" in text and "example 4" in text and "example 5" not in text and "and 2 more" in text
    assert text.endswith("7 problems, 1 warning")


# What a training asks for before it starts.


@pytest.mark.parametrize(
    "change, message",
    [
        (
            first(bbox=[25, 2, 9, 4]),
            r"json: the box \[25, 2, 9, 4\] of annotation 1 of image 1, 000001.jpg, is outside its 32 x 32 ",
        ),
        (
            first(bbox=[float("nan"), 2, 9, 4]),
            r"number 1 of its list 'annotations', id 1, has bbox \[nan, 2, 9, 4\], not",
        ),
        (first(category_id=99), "annotation 1 names category 99, which is not listed"),
        (double("annotations"), "the same id"),
        (double("images"), "the same id"),
        (
            image(file_name="x.jpg"),
            "1 of its 16 images are not in .*train2017, the first is x.jpg; tools/verify_dataset",
        ),
        (image(file_name=None), "number 1 of its list 'images', id 1, has file_name None, not a file name"),
        (first(bbox=[1, 2, 3]), r"id 1, has bbox \[1, 2, 3\], not x, y, width and height"),
        (first(bbox=["1", 2, 3, 4]), r"id 1, has bbox \['1', 2, 3, 4\], not x, y, width and height"),
        (first(area=None), "id 1, has area None, not a finite number"),
        (first(image_id=[1]), r"id 1, has image_id \[1\], not the id of an image"),
        (
            lambda document: document["annotations"][3].pop("bbox"),
            "number 4 of its list 'annotations', id 4, lacks 'bbox'",
        ),
        (image(width=40), "image 000001.jpg is 32 x 32 pixels, listed as 40 x 32"),
        (lambda document: document["images"].clear(), "has no images"),
        (lambda document: document["annotations"].clear(), "has no annotations"),
        (lambda document: document.pop("categories"), "no COCO annotation file: it has no list 'categories'"),
    ],
)
def test_a_training_is_told_before_it_starts(folder, change, message):
    edit(folder, change)
    with pytest.raises(UserError, match=message):
        check_coco_file(*pair(folder))


def test_annotation_files_that_are_none(folder):
    ann, images = pair(folder)
    for function in (check_coco_file, verify_coco):
        with pytest.raises(UserError, match="no such file: .*x.json"):
            function(folder / "x.json", images)
        with pytest.raises(UserError, match="no such folder: .*x "):
            function(ann, folder / "x")
    for content, message in (
        ("{", "no readable JSON"),
        ("\xff", "no readable JSON"),
        ("[]", "no COCO annotation file"),
    ):
        ann.write_bytes(content.encode("latin-1"))
        for function in (check_coco_file, verify_coco):
            with pytest.raises(UserError, match=message):
                function(ann, images)


# The tool


def test_tool_on_clean_and_damaged_data(folder, tmp_path):
    before = sorted(path.stat().st_mtime_ns for path in folder.rglob("*"))
    done = run("coco", folder / "coco", "--report", tmp_path / "report.json")
    assert done.returncode == 0 and done.stdout.count("nothing wrong") == 2 and not done.stderr, done.stderr
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["ok"] and len(document["reports"]) == 2
    assert run("ade20k", folder / "ade", "--classes", BACKGROUND).returncode == 0
    assert sorted(path.stat().st_mtime_ns for path in folder.rglob("*")) == before

    edit(folder, first(category_id=99))
    done = run("coco", folder / "coco", "--report", tmp_path / "report.json")
    assert done.returncode == 1 and "problem: annotation of an unknown category: 1" in done.stdout
    (report, _) = json.loads((tmp_path / "report.json").read_text())["reports"]
    assert report["problems"]["annotation of an unknown category"]["count"] == 1
    done = run("coco", folder / "coco", "--ann", "annotations/instances_val2017.json", "--images", "val2017")
    assert done.returncode == 0 and done.stdout.count("nothing wrong") == 1
    done = run("ade20k", folder / "ade", "--classes", BACKGROUND, "--no-reduce-zero-label")
    assert done.returncode == 1 and "do the classes count from 1?" in done.stdout


def test_tool_says_what_is_missing(clean, tmp_path):
    done = run("--help")
    assert done.returncode == 0 and "ade20k" in done.stdout and "Exit status" in done.stdout
    for arguments, message in (
        (["coco", tmp_path / "x"], "no such folder"),
        (["coco", clean / "ade"], "no annotations in"),
        (["coco"], "name the ROOT"),
        (["coco", clean / "coco", "--ann", "x.json"], "--ann and --images go together"),
        (["ade20k", tmp_path / "x"], "no such folder"),
        (["ade20k", clean / "coco"], "no pairs in"),
    ):
        done = run(*arguments)
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
