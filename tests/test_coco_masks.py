"""Segmentations that a training of masks can take, and those that it refuses before it starts."""

import json
import re

import numpy as np
import pytest
from commands import flags, one_line, tool

mask = pytest.importorskip(
    "pycocotools.mask", reason="pycocotools is not installed: runs after tools/setup.sh --extras all"
)

from semaim.data import coco_masks  # noqa: E402
from semaim.data.coco import check_coco_file  # noqa: E402
from semaim.data.coco_masks import cannot_decode, runs_of, undecodable  # noqa: E402
from semaim.data.scenes import write_scenes  # noqa: E402
from semaim.errors import UserError  # noqa: E402

SIZE = (40, 30)  # width, height
TRIANGLE = [4, 6, 14.5, 6, 14, 14]
HALF = {"size": [30, 40], "counts": [600, 600]}
WRONG = {
    "nothing": (None, "has no segmentation"),
    "empty": ([], "has no segmentation"),
    "text": ("polygon", "neither polygons nor run lengths"),
    "flat": (TRIANGLE, "a polygon that is no list of numbers"),
    "words": ([["a"] * 6], "no list of numbers"),
    "truth": ([[True] * 6], "no list of numbers"),
    "nested": ([[TRIANGLE]], "no list of numbers"),
    "NaN": ([[float("nan"), *TRIANGLE[1:]]], "far outside its image of 40 x 30"),
    "huge": ([[10**400, *TRIANGLE[1:]]], "far outside its image"),
    "two points": ([TRIANGLE[:4]], "no polygon of three or more points"),
    "odd": ([[*TRIANGLE, 1]], "no polygon of three or more points"),
    "box first": ([TRIANGLE[:4], TRIANGLE], "begins with a polygon of 4 numbers"),
    "other size": ({**HALF, "size": [40, 30]}, r"their size is \[40, 30\], the image has height, width \[30, 40\]"),
    "too short": ({**HALF, "counts": [600, 599]}, "do not add up to 40 x 30"),
    "negative": ({**HALF, "counts": [1201, -1]}, "do not add up"),
    "fraction": ({**HALF, "counts": [600.0, 600]}, "do not add up"),
    "letters": ({**HALF, "counts": "zzz"}, "do not add up"),
    "no counts": ({"size": [30, 40]}, "do not add up"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_decoded_is_named(name):
    shape, message = WRONG[name]
    assert re.search(message, cannot_decode(shape, SIZE))
    shapes = [[TRIANGLE], shape, [TRIANGLE, TRIANGLE[:5]], HALF]
    assert [place for place, _ in undecodable(shapes, [SIZE] * 4)] == [1]


def test_many_are_checked_as_each_one(monkeypatch):
    """The quick check against the slow one, in parts of several sizes."""
    generator = np.random.default_rng(0)
    packed = mask.frPyObjects(HALF, 30, 40)
    right = [[TRIANGLE], HALF, {**packed, "counts": packed["counts"].decode()}, [TRIANGLE, [0, 0, 1]]]
    every = right + [shape for shape, _ in WRONG.values()]
    shapes = [every[place] for place in generator.integers(0, len(every), 500)]
    slow = [(place, fault) for place, shape in enumerate(shapes) if (fault := cannot_decode(shape, SIZE))]
    assert 100 < len(slow) < 490
    for chunk in (1, 7, 1000):
        monkeypatch.setattr(coco_masks, "CHUNK", chunk)
        assert list(undecodable(shapes, [SIZE] * 500)) == slow
    assert not any(cannot_decode(shape, SIZE) for shape in right)


def test_changed_runs_that_still_fill_the_image_are_read_as_pycocotools_does():
    generator = np.random.default_rng(0)
    pixels = np.asfortranarray(generator.random((30, 40)) < 0.3, np.uint8)
    text = mask.encode(pixels)["counts"].decode()
    whole = 0
    for _ in range(300):
        place = int(generator.integers(len(text)))
        other = text[:place] + chr(int(generator.integers(40, 120))) + text[place + 1 :]
        runs = runs_of(other)
        if len(runs) and (runs >= 0).all() and runs.sum() == 1200:
            whole += 1
            expected = np.repeat(np.arange(len(runs)) % 2, runs).reshape(40, 30).T
            assert (mask.decode({"size": [30, 40], "counts": other}) == expected).all()
    assert 0 < whole < 100


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco") / "scenes"
    write_scenes(folder, 12, 64, seed=0)
    return folder / "coco"


def test_a_training_of_masks_needs_them_and_one_of_boxes_does_not(scenes):
    file = scenes / "annotations/instances_train2017.json"
    text = file.read_text()
    document = json.loads(text)
    crowd, flat, without = document["annotations"][:3]
    crowd["iscrowd"] = 1
    x, y, width, _ = flat["bbox"]
    flat.update(bbox=[x, y, width, 0], area=0, segmentation=[[x, y, x + width, y, x + width, y]])
    try:
        file.write_text(json.dumps(document))
        check_coco_file(file, scenes / "train2017", masks=True)  # a crowd, and a box without height as in COCO itself
        del without["segmentation"]
        document["annotations"][4]["segmentation"] = [[]]
        file.write_text(json.dumps(document))
        check_coco_file(file, scenes / "train2017")
        number, image = without["id"], without["image_id"]
        message = rf"json: annotation {number} of image {image}, .*\.jpg, has no segmentation, .* measured \(2 such\)"
        with pytest.raises(UserError, match=message):
            check_coco_file(file, scenes / "train2017", masks=True)
        line = ["mmdet_configs/semaim_mask_rcnn_scenes.py", "--data-root", scenes, "--work-dir", scenes / "run"]
        small = {"model.backbone.embed_dim": 32, "model.backbone.num_heads": 2, "model.neck.in_channels": 32}
        one_line(tool("train.py", *line, *flags(small)), f"annotation {number} of image {image}, ")
    finally:
        file.write_text(text)
