"""Image files that are deep, huge, damaged or doubled: what is read, refused, skipped, and found in advance."""

import io
import json
import os
import shutil
import tarfile

import cv2
import numpy as np
import pytest
import torch
from commands import flags, losses, one_line, tool
from mmengine.logging import MMLogger
from PIL import Image

from semaim.data import decoding
from semaim.data.decoding import check_whole, load_image, load_pixels
from semaim.data.folder import PretrainImages
from semaim.errors import UserError

PRETRAIN = "semaim/configs/pretrain/semaim_vit_tiny_scenes.py"
SMALL = {
    "model.network.img_size": 32, "model.network.embed_dim": 32, "model.network.num_heads": 2,
    "model.network.depth": 2, "total_batch_size": 8, "num_workers": 0, "train_cfg.max_epochs": 2,
    "default_hooks.logger.interval": 1, "default_hooks.pictures.interval": 1, "param_scheduler.warmup": 0.5,
}  # fmt: skip


def photo(seed, size=(48, 40)):
    """Smooth colours with some noise, as a photograph has."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noisy = np.asarray(coarse).astype(int) + generator.integers(-40, 40, (size[1], size[0], 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def zeroed(path):
    """Zeros over a part of the image's data."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 300] = bytes(300)
    path.write_bytes(data)


@pytest.mark.parametrize("form", ["png", "tif"])
def test_16_bits_are_read_as_their_upper_8(tmp_path, form):
    values = np.arange(48 * 40, dtype=np.uint16).reshape(40, 48) * 34
    grey, colour = tmp_path / f"grey.{form}", tmp_path / f"colour.{form}"
    Image.fromarray(values).save(grey)
    cv2.imwrite(str(colour), np.stack([values, values[::-1], values[:, ::-1]], axis=2))
    expected = np.asarray(values >> 8)
    assert len(np.unique(expected)) > 200
    for read in (lambda path: np.asarray(load_image(path)), lambda path: load_pixels(path).permute(1, 2, 0).numpy()):
        assert (read(str(grey)) == expected[..., None]).all()
        if form == "png":  # Pillow reads no TIFF files of three channels of 16 bits
            assert (read(str(colour)) == np.stack([expected[:, ::-1], expected[::-1], expected], axis=2)).all()
    # OpenCV, as mmdet and mmseg read photographs.
    assert (cv2.imread(str(grey), cv2.IMREAD_COLOR) == expected[..., None]).all()
    Image.fromarray(values.astype(np.int32) * 100).save(tmp_path / "deep.tif")
    with pytest.raises(UserError, match=r"cannot read image .*deep\.tif: .*32 bits a channel"):
        load_image(str(tmp_path / "deep.tif"))


def test_one_limit_of_pixels_for_every_decoder(tmp_path, monkeypatch):
    for name in ("a.jpg", "a.png"):
        photo(0).save(tmp_path / name)
    monkeypatch.setattr(decoding, "MOST_PIXELS", 48 * 40)
    paths = [str(tmp_path / name) for name in ("a.jpg", "a.png")]
    for path in paths:
        assert load_image(path).size == (48, 40) and load_pixels(path).shape == (3, 40, 48)
        check_whole(path)
    monkeypatch.setattr(decoding, "MOST_PIXELS", 48 * 40 - 1)
    monkeypatch.setattr(cv2, "imdecode", None)  # nothing is decoded
    monkeypatch.setattr(Image.Image, "load", None)
    for path in paths:
        for read in (load_image, load_pixels, check_whole):
            with pytest.raises(UserError, match=r"image .* has 48 x 40 pixels, more than the 1,919 that are read"):
                read(path)


def test_a_jpeg_of_20000_pixels_is_not_decoded(tmp_path):
    data = io.BytesIO()
    Image.new("L", (64, 64)).save(data, "JPEG")
    text = bytearray(data.getvalue())
    place = text.index(b"\xff\xc0") + 5
    text[place : place + 4] = (20_000).to_bytes(2, "big") * 2
    (tmp_path / "a.jpg").write_bytes(text)
    for read in (load_image, load_pixels, check_whole):
        with pytest.raises(UserError, match=r"a\.jpg has more pixels than the 178,956,970 that are read"):
            read(str(tmp_path / "a.jpg"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """120 photographs in two folders."""
    root = tmp_path_factory.mktemp("photos") / "images"
    for index in range(120):
        path = root / "ab"[index % 2] / f"{index:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(index).save(path, quality=90)
    return root


@pytest.fixture
def folder(made, tmp_path):
    """A copy to damage."""
    return shutil.copytree(made, tmp_path / "images")


def damage(folder):
    """One of each kind; the names to leave out."""
    (folder / "a/000.jpg").write_bytes(b"")
    (folder / "a/002.jpg").write_bytes((folder / "a/002.jpg").read_bytes()[:-300])
    zeroed(folder / "a/004.jpg")
    (folder / "a/006.jpg").write_text("text")
    shutil.copy(folder / "a/008.jpg", folder / "b/999.jpg")
    photo(0, (48, 9)).save(folder / "b/001.jpg")
    photo(0).save(folder / "b/wrong.png")
    data = bytearray((folder / "b/wrong.png").read_bytes())
    data[len(data) // 2] ^= 16
    (folder / "b/wrong.png").write_bytes(data)
    huge = bytearray((folder / "a/014.jpg").read_bytes())
    place = huge.index(b"\xff\xc0") + 5
    huge[place : place + 4] = (20_000).to_bytes(2, "big") * 2
    (folder / "a/014.jpg").write_bytes(huge)
    (folder / "b/notes.txt").write_text("notes")
    names = "a/000.jpg a/002.jpg a/004.jpg a/006.jpg a/014.jpg b/001.jpg b/999.jpg b/wrong.png"
    return names.split()


def test_tool_names_what_to_leave_out_and_pretraining_leaves_it_out(folder, tmp_path):
    assert tool("verify_dataset.py", "images", folder).returncode == 0
    names, out = damage(folder), tmp_path / "skip.txt"
    done = tool("verify_dataset.py", "images", folder, "--out", out, "--report", tmp_path / "report.json")
    assert done.returncode == 1 and not done.stderr, done.stderr
    assert out.read_text().split("\n") == [*names, ""]
    (report,) = json.loads((tmp_path / "report.json").read_text())["reports"]
    assert {kind: found["count"] for kind, found in report["problems"].items()} == {
        "empty file": 1, "broken image": 3, "damaged JPEG data": 1, "image with a side below 16 pixels": 1,
        "image of too many pixels": 1,
    }  # fmt: skip
    assert {kind: found["examples"] for kind, found in report["warnings"].items()} == {
        "same bytes as another image": ["b/999.jpg, a/008.jpg"], "file that is no image by its name": ["b/notes.txt"],
    }  # fmt: skip
    whole, kept = PretrainImages(str(folder)), PretrainImages(str(folder), skip=str(out))
    assert len(whole) == 122 and len(kept) == 114
    assert not {os.fsencode(folder / name) for name in names} & set(kept.paths.tolist())
    for text, message in (("a/none.jpg\n", "names no image"), (None, "cannot read dataset.skip .*: No such file")):
        if text is None:
            out.unlink()
        else:
            out.write_text(text)
        with pytest.raises(UserError, match=message):
            PretrainImages(str(folder), skip=str(out))


def test_images_in_shards_are_checked_and_left_out_too(folder, tmp_path):
    names = [name for name in damage(folder) if not name.endswith("999.jpg")]
    shards = tmp_path / "shards"
    shards.mkdir()
    with tarfile.open(shards / "0.tar", "w") as archive:
        for path in sorted(folder.rglob("*.*g")):
            archive.add(path, path.relative_to(folder))
    (shards / "1.tar").write_bytes((shards / "0.tar").read_bytes()[:2000])
    done = tool("verify_dataset.py", "images", shards, "--out", tmp_path / "skip.txt")
    assert done.returncode == 1 and "problem: broken shard: 1" in done.stdout, done.stdout + done.stderr
    (shards / "1.tar").unlink()
    kept = PretrainImages(str(shards), skip=str(tmp_path / "skip.txt"))
    left = {os.fsdecode(path).split("=")[1] for path in kept.paths.tolist()}
    assert len(kept) == 114 and not left & {*names, "b/999.jpg"}


def test_a_skipped_image_is_replaced_whatever_the_workers(folder, capfd):
    (folder / "a/010.jpg").write_text("text")
    with pytest.raises(UserError, match=r"cannot read image .*010\.jpg"):
        PretrainImages(str(folder), img_size=32)[0, 5]
    with pytest.raises(UserError, match="on_error 'ignore': choose raise or skip"):
        PretrainImages(str(folder), on_error="ignore")
    batches = [[(epoch, index) for index in range(120)] for epoch in (0, 1)]
    runs = []
    MMLogger.get_instance(str(folder))  # now the current one, which prints to what is captured here
    for workers in (0, 1, 3):
        images = PretrainImages(str(folder), img_size=32, seed=3, on_error="skip")
        loader = torch.utils.data.DataLoader(images, num_workers=workers, batch_sampler=batches)
        runs.append(list(loader))
        assert images.damaged.nonzero().flatten().tolist() == [5]
        said = capfd.readouterr()
        assert (said.out + said.err).count("image skipped, 1 of 120 so far: cannot read image") == 1
    for run in runs[1:]:
        for one, other in zip(runs[0], run, strict=True):
            assert torch.equal(one["image"], other["image"]) and torch.equal(one["draw"], other["draw"])
    assert not torch.equal(runs[0][0]["image"][5], runs[0][1]["image"][5]), "another one in another epoch"
    whole = PretrainImages(str(folder), img_size=32, seed=3)
    assert torch.equal(whole[1, 6]["image"], runs[0][1]["image"][6]), "the others are unchanged"
    assert images.preview(120).shape == (120, 3, 32, 32)


@pytest.mark.slow
def test_a_run_skips_and_resumes_and_stops_at_too_many(folder, tmp_path):
    (folder / "a/010.jpg").write_text("text")
    options = SMALL | {"dataset.on_error": "skip"}

    def train(name, *more, **changed):
        line = [PRETRAIN, "--data-root", folder, "--work-dir", tmp_path / name, *more, *flags(options | changed)]
        return tool("train.py", *line)

    done = train("whole")
    assert done.returncode == 0, done.stderr
    assert "image skipped, 1 of 120 so far: cannot read image" in done.stdout + done.stderr
    first = train("parts", **{"dataset.on_error": "raise"})
    assert first.returncode == 2 and "cannot read image" in first.stderr and losses(tmp_path / "parts")
    again = train("parts", "--resume", "--override", **{"num_workers": 2})
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    two = train("two", "--gpus", 2)  # either process may meet it, or both
    assert two.returncode == 0 and "image skipped, 1 of 120 so far" in two.stdout + two.stderr, two.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    for name in ("a/012.jpg", "b/001.jpg"):
        (folder / name).write_text("text")
    one_line_at_end = train("many")
    assert one_line_at_end.returncode == 2
    last = one_line_at_end.stderr.strip().splitlines()[-1]
    assert "2 of 120 images cannot be read, more than dataset.most_damaged=0.01" in last
    one_line(train("wrong", **{"dataset.on_error": "ignore"}), "dataset.on_error 'ignore': choose raise or skip")
