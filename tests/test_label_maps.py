"""Checks of label maps: each kind of damage is found alone and named."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semaim.data.label_maps import verify_ade20k
from semaim.data.scenes import BACKGROUND, write_scenes

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


def broken(path):
    path.write_bytes(path.read_bytes()[:-200])


def checksum(path):
    """The checksum of a PNG's pixels, of which decoding takes no notice."""
    data = bytearray(path.read_bytes())
    data[data.index(b"IEND") - 5] ^= 1
    path.write_bytes(data)


def deep(path):
    """32 bits, whose values cannot be counted in a table."""
    values = np.ones((SIZE, SIZE), np.int32)
    values[0, 0] = 2**31 - 1
    Image.fromarray(values).save(path, "TIFF")


def fine(report):
    """No warning, but that few small scenes have not all classes."""
    return report.warnings.keys() <= {"classes that never occur", "validated on, but never trained"}


def save(values):
    return lambda label: Image.fromarray(values).save(label)


def filled(value, dtype=np.uint8):
    return save(np.full((SIZE, SIZE), value, dtype))


@pytest.mark.parametrize(
    "place, damage, kind, example",
    [
        ("images", Path.unlink, "label map without image", "training/000003.png"),
        ("annotations", Path.unlink, "image without label map", "training/000003.jpg"),
        ("images", broken, "broken image", "training/000003.jpg: image file is truncated"),
        ("annotations", broken, "broken label map", "training/000003.png"),
        ("annotations", checksum, "broken label map", "training/000003.png: broken PNG file"),
        ("annotations", deep, "value beyond the classes", "training/000003.png: 2147483647; of 21 classes"),
        ("annotations", filled(22), "value beyond the classes", "training/000003.png: 22; of 21 classes"),
        ("annotations", filled(300, np.uint16), "value beyond the classes", "training/000003.png: 300; of 21"),
        (
            "annotations",
            save(np.ones((SIZE, 8), np.uint8)),
            "label map and image differ in size",
            "8 x 32, its image 32",
        ),
        ("annotations", save(np.ones((SIZE, SIZE, 3), np.uint8)), "label map that is not one channel", "mode RGB"),
        ("annotations", save(np.ones((SIZE, SIZE), bool)), "label map that is not one channel", "mode 1"),
    ],
)
def test_damage_in_ade20k_is_named(folder, place, damage, kind, example):
    damage(folder / "ade" / place / "training" / ("000003" + (".jpg" if place == "images" else ".png")))
    report = verify_ade20k(folder / "ade", BACKGROUND, workers=2)
    (name, finding), *others = report.problems.items()
    assert name.startswith(kind) and finding.count == 1 and not others and fine(report), str(report)
    assert example in finding.examples[0]


def test_maps_of_16_bits_and_ignored_pixels_are_fine(folder):
    labels = folder / "ade/annotations/training"
    filled(21, np.uint16)(labels / "000001.png")
    values = np.full((SIZE, SIZE), 255, np.uint8)
    values[:4] = 7
    save(values)(labels / "000002.png")
    (labels / "._000001.png").write_text("of another system")
    report = verify_ade20k(folder / "ade", BACKGROUND, workers=1)
    assert not report.problems and fine(report), str(report)
    filled(255)(labels / "000002.png")
    found = verify_ade20k(folder / "ade", BACKGROUND, workers=1).warnings["nothing labelled"]
    assert found.count == 1 and found.examples == ["1 of 16 maps of training: training/000002.png"]


def test_reduce_zero_label_that_looks_wrong(folder):
    kind = "reduce_zero_label looks wrong"
    report = verify_ade20k(folder / "ade", BACKGROUND, reduce_zero_label=False, workers=1)
    finding = report.problems["value beyond the classes"]
    assert finding.count == 20 and "values reach 21: do the classes count from 1?" in finding.examples[0]
    # 0 never occurs there while objects are whole; then counted from 0.
    report = verify_ade20k(folder / "ade", BACKGROUND + 1, workers=1)
    assert "the largest value is 21 and 0" in report.warnings[kind].examples[0]
    assert set(report.problems) == {"counted from 0, it seems"}
    assert not verify_ade20k(folder / "ade", BACKGROUND + 1, workers=1, most_ignored=0.5).problems
    for label in (folder / "ade/annotations").rglob("*.png"):
        save(np.maximum(np.asarray(Image.open(label)), 1) - 1)(label)
    report = verify_ade20k(folder / "ade", BACKGROUND, workers=1)
    assert "the largest value is 20 and 0 occurs" in report.warnings[kind].examples[0]
    report = verify_ade20k(folder / "ade", BACKGROUND, reduce_zero_label=False, workers=1)
    assert not report.problems and fine(report), str(report)
