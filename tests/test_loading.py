"""The benchmark of the loader: what it compares copies by, and the loaders of other libraries where they are."""

import json

import numpy as np
import pytest
import torch
from commands import tool
from PIL import Image

from semaim.benchmarks.baselines import PlainImages
from semaim.benchmarks.loading import Passes, compared, copy_differences, passes, write_textures
from semaim.benchmarks.other_loaders import OTHERS, dali_loader, installed, webdataset_loader, write_shards
from semaim.data.copying import shrink
from semaim.data.folder import PretrainImages, find_images

DALI = OTHERS[1][1]


def ramp(size):
    """Brightness that grows by one level every two pixels of 400 along each side."""
    x, y = (np.arange(side) * 400 / side for side in size)
    return Image.fromarray((x[None, :] / 4 + y[:, None] / 4).round().astype(np.uint8)).convert("RGB")


def test_crops_of_copies_are_of_the_same_regions(tmp_path):
    paths = []
    for name, size in {"original": (400, 400), "half": (200, 200), "flat": (200, 400)}.items():
        paths.append(str(tmp_path / f"{name}.png"))
        ramp(size).save(paths[-1])
    original, half, flat = paths
    shifted = str(tmp_path / "shifted.png")
    Image.fromarray(np.roll(np.asarray(ramp((400, 400))), 40, axis=1)).save(shifted)
    assert copy_differences([original] * 20, [original] * 20, 64) == (0, 0, 0)
    for copy in (half, flat):
        assert copy_differences([original] * 20, [copy] * 20, 64)[0] < 1
    assert copy_differences([original] * 20, [shifted] * 20, 64)[0] > 5
    # A crop has at least 0.2 of the area and at most 4 sides of 3: 155 pixels a side in the original, 77 in the half.
    assert copy_differences([original] * 20, [half] * 20, 77)[1:] == (0, 0)
    assert copy_differences([original] * 20, [half] * 20, 201)[1] == 1
    assert copy_differences([original] * 20, [half] * 20, 401)[2] == 1


def test_a_pass_that_leaves_images_out_counts_fewer(monkeypatch):
    monkeypatch.setattr("semaim.benchmarks.measuring.seconds", lambda work, device, inner: (work(), 2.0)[1])
    row = compared("a", Passes([1], 90), Passes([1], 60), 2, 3, {"data": "x"}, 1.5)
    assert (row.ours, row.baseline, row.ratio, row.spread) == (22.5, 15, 1.5, (1.5, 1.5)) and row.verdict == "met"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_has_images_as_often_as_asked(tmp_path, workers):
    write_textures(tmp_path, 3, (60, 40))
    for images in (PretrainImages(str(tmp_path), 16), PlainImages(tmp_path, 16)):
        loader, seen = passes(images, 4, workers, 5)
        for _ in range(2):
            found = [batch["image"] if isinstance(batch, dict) else batch for batch in loader]
            assert [len(batch) for batch in found] == [4, 4, 4] and seen == 12
        assert len(images) == 3


def test_the_plain_loader_without_floats_has_the_same_crops(tmp_path):
    write_textures(tmp_path, 2, (100, 75))
    floats, numbers = PlainImages(tmp_path, 32), PlainImages(tmp_path, 32, floats=False)
    torch.manual_seed(0)
    expected = numbers[1]
    torch.manual_seed(0)
    found = floats[1]
    mean, std = (torch.tensor(value)[:, None, None] for value in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert expected.dtype == torch.uint8
    torch.testing.assert_close((found * std + mean) * 255, expected.float(), atol=1e-3, rtol=0)
    shrink(tmp_path, tmp_path.with_name("copy"), 50)
    assert (
        len(PlainImages(tmp_path.with_name("copy"), 32)) == 2 and PlainImages(tmp_path.with_name("copy"), 32)[0].any()
    )


@pytest.fixture
def shards(tmp_path):
    """Eleven images of one colour each in four shards."""
    paths = []
    for index in range(11):
        paths.append(str(tmp_path / f"{index:02}.jpg"))
        Image.new("RGB", (90, 60), (20 * index, 0, 0)).save(paths[-1], quality=100)
    found = write_shards(paths, tmp_path / "shards", 4)
    assert len(found) == 4 and len(find_images(tmp_path / "shards")) == 11
    return found


@pytest.mark.skipif(not installed(("webdataset",)), reason="no webdataset: runs after pip install webdataset")
@pytest.mark.parametrize("workers", [0, 2])
def test_webdataset_has_every_image_once_a_pass(shards, workers):
    loader, images = webdataset_loader(shards, 11, 32, 4, workers)
    for _ in range(2):
        batches = [batch for (batch,) in loader]
        assert all(batch.dtype == torch.uint8 and batch.shape[1:] == (3, 32, 32) for batch in batches)
        reds = torch.cat([batch[:, 0].float().mean(dim=(1, 2)) for batch in batches])
        assert len(reds) == images == 11 and (reds.sort().values - 20 * torch.arange(11)).abs().max() < 3


@pytest.mark.skipif(not installed(DALI), reason="no DALI: runs after pip install nvidia-dali-cuda130")
def test_dali_has_other_images_in_every_batch_of_a_pass(shards):
    loader, images = dali_loader(shards, 11, 32, 4, 0)
    batches = list(loader)
    assert images == 8 and len(batches) == 2 and all(batch.shape == (4, 32, 32, 3) for batch in batches)
    reds = torch.cat(batches)[..., 0].float().mean(dim=(1, 2))
    assert len((reds / 20).round().unique()) == 8 and (reds / 20 - (reds / 20).round()).abs().max() < 0.15


@pytest.mark.slow
def test_the_rows_of_the_loader(tmp_path):
    (tmp_path / "images").mkdir()
    write_textures(tmp_path / "images", 16, (100, 75))
    line = ["--data", tmp_path / "images", "--img-size", 32, "--batch", 8, "--workers", 0, "--repeats", 1]
    done = tool("benchmark.py", "loader", *line, "--copies", 48, 60, "--out", tmp_path / "rows.json")
    assert done.returncode == 0, done.stderr
    rows = {row["what"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert len(rows) == 13
    for name, packages, _ in OTHERS:
        (row,) = (row for what, row in rows.items() if what.startswith(f"the same against {name}"))
        if installed(packages):
            assert row["ratio"] > 0 and installed(packages) in row["what"]
        else:
            assert row["verdict"] == f"not measured: {packages[0]} is not installed"
    assert rows["ours on a copy of short side 48, against ours on its originals, in the process"]["ratio"] > 0
    small, large = (rows[f"copy of short side {side}: mean difference of crops"]["ours"] for side in (48, 60))
    assert 0.5 < large < small < 20
