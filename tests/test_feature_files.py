"""semaim features and the pictures of patches, against semaim.load_encoder and numpy's singular value decomposition."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from commands import CPU, ROOT, one_line
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

import semaim
from semaim.checkpoints import export
from semaim.drawing.columns import components_of
from semaim.engine.feature_files import NpyFile
from semaim.errors import UserError
from semaim.library import order_of


@pytest.fixture(scope="module")
def exported(pretrained, tmp_path_factory):
    """The encoder of the pretraining as a folder that timm opens."""
    folder = tmp_path_factory.mktemp("exported") / "timm"
    export(pretrained, folder)
    return folder


@pytest.fixture(scope="module")
def images(scenes):
    """The paths of the ten validation images."""
    return sorted(map(str, (scenes / "val").rglob("*.jpg")))


def expected(encoder, paths, size=32, share=0.875):
    """Tokens of images that torchvision prepares by hand."""
    steps = [v2.Resize(share, interpolation=InterpolationMode.BICUBIC), v2.CenterCrop(size), v2.PILToTensor()]
    crop = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(encoder.mean, encoder.std)])
    with torch.no_grad():
        return encoder(torch.stack([crop(Image.open(path).convert("RGB")) for path in paths]))


def test_features_are_those_of_the_library(pretrained, exported, images, scenes, here, tmp_path):
    """Of a checkpoint of ours the resized side is rounded, 36.57 to 37; timm's own transform cuts it off at 36."""
    for source, side in ((pretrained, 37), (f"local-dir:{exported}", 36)):
        encoder = semaim.load_encoder(source)
        tokens = expected(encoder, images, share=side)
        for name, words, right in (
            ("cls", [], tokens[:, 0]),
            ("avg", ["--pool", "avg"], tokens[:, 1:].mean(1)),
            ("patches", ["--tokens"], tokens[:, 1:]),
        ):
            out = tmp_path / f"{name}.npy"
            line = ["features.py", source, scenes / "val", "--out", out, "--batch", 4, "--workers", 0, *words]
            done = here(*line)
            assert done.returncode == 0, done.stderr
            found = np.load(out, mmap_mode="r")
            assert found.dtype == np.float32 and found.shape == tuple(right.shape)
            assert torch.allclose(torch.from_numpy(found.copy()), right, atol=2e-5)
            assert out.with_suffix(".txt").read_text().splitlines() == images
            assert not list(tmp_path.glob("*.part"))


def test_a_parquet_file_has_the_same_rows(pretrained, images, here, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="no pyarrow: runs after tools/setup.sh")
    for ending in ("npy", "parquet"):
        out = tmp_path / f"new/x.{ending}"
        assert here("features.py", pretrained, *images, "--out", out, "--workers", 0).returncode == 0
    table = parquet.read_table(tmp_path / "new/x.parquet")
    assert table["path"].to_pylist() == images
    assert (np.stack(table["features"].to_numpy()) == np.load(tmp_path / "new/x.npy")).all()


def test_a_parquet_file_without_pyarrow_is_a_line(pretrained, images, here, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    done = here("features.py", pretrained, images[0], "--out", tmp_path / "x.parquet")
    one_line(done, "pyarrow is missing")
    assert "name a .npy file" in done.stderr and not list(tmp_path.iterdir())


def test_images_that_cannot_be_read_have_no_row(pretrained, images, here, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    out = tmp_path / "x.npy"
    done = here("features.py", pretrained, images[0], broken, images[1], "--out", out, "--workers", 1, "--batch", 2)
    assert done.returncode == 2 and done.stderr.count("\n") == 2, done.stderr
    assert f"cannot read image {broken}" in done.stderr and "1 of 3 images have no row" in done.stderr
    assert len(np.load(out)) == 2 and (tmp_path / "x.txt").read_text().splitlines() == images[:2]


def test_mistakes_are_a_line_and_leave_nothing(pretrained, images, here, tmp_path):
    line = ["features.py", pretrained, images[0], "--out"]
    one_line(here(*line, tmp_path / "x.csv"), "name a .npy or .parquet file")
    one_line(here(*line, tmp_path / "x.parquet", "--tokens"), "patch tokens are written to a .npy file")
    one_line(here(*line, tmp_path / "x.npy", "--size", 30), "no whole number of 8 x 8 patches")
    one_line(here(*line, tmp_path / "x.npy", "--batch", 0), "--batch 0: give 1 or more")
    (tmp_path / "x.txt").write_text("a list of the user's")
    one_line(here(*line, tmp_path / "x.npy"), "x.txt, which is of no earlier x.npy: name another file")
    assert (tmp_path / "x.txt").read_text() == "a list of the user's"
    (tmp_path / "x.txt").unlink()
    one_line(here("features.py", "nothing.pth", images[0], "--out", tmp_path / "x.npy"), "no such checkpoint")
    (tmp_path / "broken.jpg").write_bytes(b"")
    done = here("features.py", pretrained, tmp_path / "broken.jpg", "--out", tmp_path / "x.npy", "--workers", 0)
    assert done.returncode == 2 and "nothing is written" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["broken.jpg"]


def test_an_interrupted_command_leaves_no_file(pretrained, images, tmp_path):
    many = [tmp_path / f"{number}.jpg" for number in range(3000)]
    for link in many:
        link.symlink_to(images[0])
    out = tmp_path / "out/x.npy"
    line = [sys.executable, "tools/features.py", pretrained, tmp_path, "--out", out, "--batch", "1", "--workers", "0"]
    with subprocess.Popen(line, cwd=ROOT, env={**os.environ, **CPU}, stderr=subprocess.PIPE, text=True) as child:
        until = time.monotonic() + 120
        while not (out.parent / "x.npy.part").exists() and time.monotonic() < until:
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 130 and child.stderr.read().strip() == "interrupted"
    assert not list(out.parent.iterdir())


@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.sampled_from([(3,), (2, 5), (1,)]))
def test_rows_in_any_parts_are_one_array(tmp_path_factory, lengths, shape):
    path = tmp_path_factory.mktemp("rows") / "x.npy"
    rows = np.random.default_rng(0).normal(size=(sum(lengths), *shape)).astype(np.float32)
    file, start = NpyFile(path), 0
    for length in lengths:
        file.add(rows[start : start + length], [f"{number}.jpg" for number in range(start, start + length)])
        start += length
    assert not path.exists()
    file.finish()
    assert (np.load(path) == rows).all() and len(path.with_suffix(".txt").read_text().splitlines()) == len(rows)


# Pictures of patches


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 9), st.integers(1, 8))
def test_components_are_those_of_numpys_singular_value_decomposition(seed, images, patches, width):
    tokens = np.random.default_rng(seed).normal(size=(images, patches, width)) * np.arange(1, width + 1) ** 2
    found = components_of(torch.from_numpy(tokens).float()).numpy()
    assert found.shape == (images, patches, 3) and (found >= 0).all() and (found <= 1).all()
    flat = tokens.astype(np.float32).astype(np.float64).reshape(-1, width)
    flat -= flat.mean(0)
    _, values, rows = np.linalg.svd(flat, full_matrices=False)
    for place in range(3):
        mine = found.reshape(-1, 3)[:, place]
        if place >= len(values) or values[place] < 1e-5 * max(values[0], 1e-30):
            assert np.allclose(mine, 0.5)
            continue
        direction = rows[place] * np.sign(rows[place][np.abs(rows[place]).argmax()])
        scores = flat @ direction
        assert np.allclose(mine, (0.5 + scores / (4 * scores.std())).clip(0, 1), atol=1e-6)


def test_components_do_not_depend_on_the_order_of_the_images():
    tokens = torch.randn(3, 16, 12, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(components_of(tokens).flip(0), components_of(tokens.flip(0)), atol=1e-9)
    assert (components_of(torch.ones(2, 4, 8)) == 0.5).all()


def test_pictures_of_any_encoder(pretrained, exported, images, here, tmp_path):
    from semaim.engine.looking import model_to_draw

    out = tmp_path / "p.png"
    for source, columns in ((pretrained, 4), (f"local-dir:{exported}", 4)):
        line = ["visualize.py", "pca", source, *images[:2], "--out", out]
        assert here(*line).returncode == 0
        assert Image.open(out).width == 160 * columns
        first = out.read_bytes()
        assert here(*line).returncode == 0 and out.read_bytes() == first
    for kind, columns in (("order", 3), ("similarity", 4)):
        assert here("visualize.py", kind, f"local-dir:{exported}", *images[:2], "--out", out).returncode == 0
        assert Image.open(out).width == 160 * columns
    one_line(here("visualize.py", "attention", f"local-dir:{exported}", images[0], "--out", out), "is not known")
    one_line(here("visualize.py", "reconstruction", f"local-dir:{exported}", images[0], "--out", out), "no pretraining")
    # The order drawn is the library's.
    model, size, _ = model_to_draw(f"local-dir:{exported}")
    encoder = semaim.load_encoder(f"local-dir:{exported}")
    seen = model.data_preprocessor.normalise(torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8))
    draw = torch.rand(2, (size // 8) ** 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model.network(seen, draw)
    similarity, order = order_of(encoder, seen)
    assert torch.equal(output.order, order) and torch.allclose(output.similarity, similarity)
    with pytest.raises(UserError, match="--cfg-options is for a pretraining's checkpoint"):
        model_to_draw(f"local-dir:{exported}", options={"model.network.order": "raster"})
