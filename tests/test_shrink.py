"""Copies of data sets with smaller images: what is in them, that every task reads them, what is refused and found."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from commands import ROOT, flags, losses, one_line, results, tool
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_image_files import PRETRAIN, SMALL, photo, zeroed
from torchvision.transforms.functional import _compute_resized_output_size

from semaim.data import copying
from semaim.data.copying import in_order, shards_of, shrink
from semaim.data.decoding import load_image, load_pixels
from semaim.data.few import read_list
from semaim.data.folder import find_images
from semaim.data.labelled import LabelledImages, find_labelled
from semaim.data.pools import locked
from semaim.data.shards import inner_name
from semaim.data.shrinking import shrink_to
from semaim.errors import UserError

KNN = "semaim/configs/knn/vit_tiny_scenes.py"


def smooth(size, seed=0):
    """A picture of which JPEG loses little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def kinds(tmp_path):
    """Large images of all kinds and two that are small, in folders."""
    folder = tmp_path / "kinds"
    for name in ("a", "b/c"):
        (folder / name).mkdir(parents=True)
    wide = smooth((150, 100))
    turned = Image.Exif()
    turned[0x0112] = 6
    wide.save(folder / "a/exif.jpg", exif=turned, quality=95)
    wide.convert("CMYK").save(folder / "a/cmyk.JPEG", quality=95)
    wide.convert("L").save(folder / "a/grey.jpeg", quality=95)
    wide.quantize(64).save(folder / "b/palette.png", transparency=3)
    alpha = wide.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(wide.size))
    alpha.save(folder / "b/alpha.png")
    Image.fromarray(np.asarray(wide.convert("L")).astype(np.uint16) * 200).save(folder / "b/deep.png")
    smooth((64, 200)).save(folder / "b/c/tall ü.bmp")
    smooth((90, 48)).save(folder / "b/c/small.jpg", quality=40)
    smooth((30, 30)).save(folder / "b/c/tiny.png")
    return folder


def contents(folder):
    """The bytes of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def members(shard):
    """Name -> bytes, as Python's own reader finds them."""
    with tarfile.open(shard) as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive}


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 600))
def test_sizes_are_torchvisions_and_never_larger(height, width, side):
    if min(height, width) <= side:
        assert shrink_to((height, width), side) == (height, width)
    else:
        assert list(shrink_to((height, width), side)) == _compute_resized_output_size((height, width), [side])


@given(st.lists(st.tuples(st.sampled_from(["", "a", "a/b", "c"]), st.integers(0, 99)), unique=True))
def test_shards_are_of_one_folder_and_hold_every_image_once(pairs):
    names = sorted(os.path.join(folder, f"{number}.jpg") for folder, number in pairs)
    copying_size, copying.SHARD = copying.SHARD, 7
    try:
        found = shards_of(names)
    finally:
        copying.SHARD = copying_size
    assert sorted(name for part in found.values() for name in part) == names
    assert all(0 < len(part) <= 7 and part == sorted(part) for part in found.values())
    assert all({os.path.dirname(name) for name in part} == {os.path.dirname(shard)} for shard, part in found.items())


def test_a_copy_has_the_pixels_that_the_loader_reads_made_smaller(kinds, tmp_path):
    done = tool("shrink.py", kinds, tmp_path / "copy", "--side", 48, "--quality", 95)
    assert done.returncode == 0, done.stderr
    assert "9 images in 3 shards, 2 of them small enough as they were" in done.stdout
    source, copy = find_images(kinds), find_images(tmp_path / "copy")
    names = [os.path.relpath(path, kinds) for path in source]
    assert sorted(inner_name(path).removesuffix(".jpg") for path in copy) == sorted(
        name.removesuffix(".jpg") for name in names
    )
    by_name = {inner_name(path): path for path in copy}
    for name, path in zip(names, source, strict=True):
        found = by_name.get(name) or by_name[f"{name}.jpg"]
        image = load_image(path)
        if min(image.size) <= 48:
            assert members(tmp_path / "copy/b/c/000000.tar")[name] == open(path, "rb").read()
            continue
        width, height = image.size
        expected = image.resize((48 * width // height, 48) if width > height else (48, 48 * height // width), 3)
        pixels = load_pixels(found).permute(1, 2, 0).numpy()
        assert pixels.shape == (*expected.size[::-1], 3), name
        difference = np.abs(pixels.astype(int) - np.asarray(expected, int)).mean()
        assert difference < (4 if "palette" in name else 2), (name, difference)  # of 256 levels; dither is fine grain
    record = json.loads((tmp_path / "copy/shrink.json").read_text())
    sizes = [len(data) for shard in (tmp_path / "copy").rglob("*.tar") for data in members(shard).values()]
    assert record["total"] == {
        "images": 9, "as_they_were": 2, "bytes": sum(sizes), "bytes_of_source": sum(map(os.path.getsize, source)),
    }  # fmt: skip


def test_the_same_bytes_on_any_number_of_processes_and_after_an_end_in_between(kinds, tmp_path, monkeypatch):
    monkeypatch.setattr(copying, "SHARD", 2)
    monkeypatch.setattr(copying, "CHUNK", 1)
    for workers in (1, 3):
        assert not shrink(kinds, tmp_path / str(workers), 40, workers=workers).problems
    once = contents(tmp_path / "1")
    assert once == contents(tmp_path / "3") and len(once) == 7
    # The last folder cannot be written: what is finished is kept, under no name that training reads.
    part = tmp_path / ".cut.part"
    real, written = copying.add, []

    def add(archive, image, part):
        written.append(image.name)
        if len(written) == 6:
            raise KeyboardInterrupt
        real(archive, image, part)

    monkeypatch.setattr(copying, "add", add)
    with pytest.raises(KeyboardInterrupt):
        shrink(kinds, tmp_path / "cut", 40)
    assert not (tmp_path / "cut").exists() and not list(part.rglob("*.partial"))
    kept = {path: path.stat().st_mtime_ns for path in part.rglob("*.tar")}
    assert len(kept) == 3
    shrink(kinds, tmp_path / "cut", 40)
    assert contents(tmp_path / "cut") == once and not part.exists()
    assert len(written) == 6 + 4, "images of finished shards are not read again"
    assert all((tmp_path / "cut" / path.relative_to(part)).stat().st_mtime_ns == at for path, at in kept.items())


def is_locked(folder):
    """Whether a process holds a folder's lock."""
    try:
        with locked(folder):
            return False
    except BlockingIOError:
        return True


@pytest.mark.slow
def test_a_killed_command_goes_on(tmp_path):
    for folder in range(12):
        (tmp_path / f"source/{folder:02}").mkdir(parents=True)
        for index in range(8):
            photo(8 * folder + index, (900, 700)).save(tmp_path / f"source/{folder:02}/{index}.jpg")
    line = [sys.executable, ROOT / "tools/shrink.py", tmp_path / "source", tmp_path / "copy", "--side", "64"]
    line += ["--workers", "2"]
    child = subprocess.Popen(line, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    part = tmp_path / ".copy.part"
    while child.poll() is None and len(list(part.rglob("*.tar"))) < 2:
        time.sleep(0.01)
    child.send_signal(signal.SIGSTOP)
    one_line(tool("shrink.py", *line[2:]), "another process is writing")
    child.send_signal(signal.SIGKILL)
    child.wait()
    while is_locked(part):  # by its processes, which end with it
        time.sleep(0.01)
    assert part.exists() and not (tmp_path / "copy").exists(), "killed too late"
    one_line(tool("shrink.py", *line[2:], "--check"), "is not there; an unfinished copy is: leave out --check to go on")
    assert tool("shrink.py", *line[2:]).returncode == 0
    shrink(tmp_path / "source", tmp_path / "whole", 64)
    assert contents(tmp_path / "copy") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_every_task_reads_a_copy_as_its_source(labelled, pretrained, tmp_path):
    copy = tmp_path / "copy"
    done = tool("shrink.py", labelled, copy, "--side", 500)
    assert done.returncode == 0 and "50 images in 10 shards, 50 of them small enough as they were" in done.stdout
    options = {"model.network.img_size": 32, "model.network.embed_dim": 32, "model.network.num_heads": 2}
    options |= {"model.network.depth": 2, "num_workers": 0}
    found, trained = [], []
    for data in (labelled, copy):
        work = tmp_path / f"knn{len(found)}"
        line = [KNN, pretrained, "--data-root", data, "--work-dir", work, "--tasks", "knn,test_sets"]
        line += ["--test-root", f"again={data}/val"]
        done = tool("test.py", *line, *flags({**options, "evaluation.ks": "[3]"}))
        assert done.returncode == 0, done.stderr
        found.append({task: results(work / task)["metrics"] for task in ("knn", "test_sets")})
        work = tmp_path / f"train{len(trained)}"
        done = tool("train.py", PRETRAIN, "--data-root", data, "--work-dir", work, *flags(SMALL))
        assert done.returncode == 0, done.stderr
        trained.append(losses(work))
    assert found[0] == found[1] and all(found[0].values())
    assert trained[0] == trained[1] and len(trained[0]) == 10
    assert find_labelled(labelled, "val")[1:] == find_labelled(copy, "val")[1:]
    one, other = LabelledImages(labelled, 32, "train", "none"), LabelledImages(copy, 32, "train", "none")
    names = one.names()
    (tmp_path / "list.txt").write_text("\n".join([names[3], names[20].split("/", 1)[1], names[39].split("/")[-1]]))
    assert read_list(tmp_path / "list.txt", one).tolist() == read_list(tmp_path / "list.txt", other).tolist()


@pytest.fixture
def small(tmp_path):
    """Two folders of three photographs, the last of which is cut off in its header."""
    for folder in "ab":
        (tmp_path / f"source/{folder}").mkdir(parents=True)
        for index in range(3):
            photo(index).save(tmp_path / f"source/{folder}/{index}.jpg", quality=95)
    path = tmp_path / "source/b/2.jpg"
    path.write_bytes(path.read_bytes()[:100])
    return tmp_path / "source"


def test_images_that_cannot_be_read_are_named_or_left_out(small, tmp_path, here):
    zeroed(small / "a/1.jpg")
    (small / "labels.txt").write_text("0")
    line = ["shrink.py", small, tmp_path / "copy", "--side", 24]
    one_line(here(*line), f"cannot read image {small}/b/2.jpg: broken or no image")
    one_line(here(*line, "--on-error", "skip"), "1 of 6 images cannot be read, more than --most-damaged 0.01")
    done = here(*line, "--on-error", "skip", "--most-damaged", 0.2)
    assert done.returncode == 0 and "5 images in 2 shards" in done.stdout
    assert "warning: image that cannot be read, left out: 1\n    b/2.jpg: broken or no image" in done.stdout
    assert "warning: damaged JPEG data in the source, kept as training sees it: 1\n    a/1.jpg: " in done.stdout
    assert "warning: file that is no image by its name, not copied: 1\n    labels.txt" in done.stdout
    assert list(members(tmp_path / "copy/b/000000.tar")) == ["b/0.jpg", "b/1.jpg"]
    record = json.loads((tmp_path / "copy/shrink.json").read_text())
    assert list(record["shards"]["b/000000.tar"]["left_out"]) == ["b/2.jpg"]
    assert here(*line, "--check").stdout == done.stdout


def test_what_is_wrong_with_a_copy_is_found(small, tmp_path, here):
    (small / "b/2.jpg").unlink()
    photo(9, (20, 20)).save(small / "b/2.jpg")
    copy = tmp_path / "copy"
    shrink(small, copy, 24)
    whole = contents(copy)
    shard, other = copy / "a/000000.tar", copy / "b/000000.tar"

    def check(message):
        done = here("shrink.py", small, copy, "--side", 24, "--check")
        assert done.returncode == (1 if message else 0) and message in done.stdout, done.stdout + done.stderr
        shutil.rmtree(copy)
        for name, data in whole.items():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(data)

    check("")
    shard.write_bytes(shard.read_bytes()[:1000])
    check("makes it anew\n  problem: broken shard: 1\n    a/000000.tar: ")
    shard.unlink()
    check("broken shard: 1\n    a/000000.tar: cannot read")
    shard.write_bytes(other.read_bytes())
    check("shard with other images than its source: 1\n    a/000000.tar: 3")
    data = bytearray(shard.read_bytes())
    data[512:515] = b"xxx"
    shard.write_bytes(data)
    check("wrong image: 1\n    a/000000.tar: cannot read image")
    data = bytearray(other.read_bytes())
    last = data.rindex(b"\xff\xd9")
    data[last - 5] ^= 1
    other.write_bytes(data)
    check("wrong image: 1\n    b/000000.tar: b/2.jpg: not the source's file")
    shutil.copy(shard, copy / "a/000001.tar")
    check("file that the copy should not have: 1\n    a/000001.tar")
    check("")
    os.utime(small / "a/0.jpg", (1, 1))
    photo(3, (60, 30)).save(small / "a/0.jpg")
    one_line(here("shrink.py", small, copy, "--side", 24, "--check"), f"is no copy of {small} as it is now")


def test_a_shard_that_is_wrong_at_the_end_is_written_again(small, tmp_path):
    line = ["shrink.py", small, tmp_path / "copy", "--side", 24, "--on-error", "skip", "--most-damaged", 1]
    one_line(tool(*line[:5]), "cannot read image")
    shard = tmp_path / ".copy.part/a/000000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole.replace(b"\xff\xd8", b"xx", 1))
    done = tool(*line)
    assert done.returncode == 1 and "wrong image: 1" in done.stdout and "unfinished, in" in done.stdout
    assert not (tmp_path / "copy").exists() and tool(*line).returncode == 0
    assert (tmp_path / "copy/a/000000.tar").read_bytes() == whole
    shrink(small, tmp_path / "other", 24, on_error="skip", most_damaged=1)
    assert contents(tmp_path / "copy") == contents(tmp_path / "other")


@pytest.mark.parametrize(
    ("source", "target", "more", "message"),
    [
        ("source", "source/copy", [], "lie in each other"),
        ("source", ".", [], "lie in each other"),
        ("source", "full", [], "full exists and is no copy that this command has finished"),
        ("source", "full/file", [], "full/file exists and is no copy"),
        ("source", "done", ["--side", "32"], "done has --side 24: give the same"),
        ("source", "done", ["--quality", "80"], "done has --quality 90: give the same"),
        ("source/a", "done", [], "is no copy of"),
        ("source", "part", [], "part.part is no unfinished copy: remove it"),
        ("source", "held", [], "another process is writing"),
        ("source", "new", ["--check"], "new is not there"),
        ("source", "new", ["--quality", "101"], "--quality 101: give 1 to 100"),
        ("source", "new", ["--most-damaged", "nan"], "--most-damaged nan: give a share, from 0 to 1"),
        ("source", "new", ["--side", "8"], "give a whole number of 16 or more"),
        ("nowhere", "new", [], "nowhere\n"),
        ("done", "new", [], "its shards are not read, unpack them"),
        ("full", "new", [], "no images in "),
        ("ade", "new", [], "annotations holds label maps, not images"),
        ("twice", "new", [], "x.png and x.png.jpg"),
    ],
)
def test_mistakes_are_one_line(small, tmp_path, source, target, more, message):
    for name in ("full", ".part.part", ".held.part", "ade/annotations/training", "twice"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("full/file", ".part.part/file"):
        (tmp_path / name).write_text("text")
    for name in ("ade/annotations/training/x.png", "twice/x.png", "twice/x.png.jpg", "source/b/2.jpg"):
        photo(0).save(tmp_path / name)
    shrink(small, tmp_path / "done", 24)
    before = contents(tmp_path)
    with locked(tmp_path / ".held.part"):
        one_line(tool("shrink.py", tmp_path / source, tmp_path / target, "--side", 24, *more), message)
    assert contents(tmp_path) == before


def test_names_of_other_bytes_are_recorded(small, tmp_path, here):
    os.rename(small / "b", os.fsencode(small) + b"/b\xff\x1b")
    line = ["shrink.py", small, tmp_path / "copy", "--side", 24]
    one_line(here(*line), "cannot read image")
    assert here(*line, "--on-error", "skip", "--most-damaged", 1).returncode == 0
    assert here(*line, "--check").returncode == 0


def test_a_mount_point_is_refused(small, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(copying.Path, "is_mount", lambda path: path.name == "disk")
    with pytest.raises(UserError, match="disk is a mount point: name a folder in it"):
        shrink(small, tmp_path / "disk", 24)


@pytest.mark.parametrize("part", [None, {"left_out": []}, {"damaged": 1}, {"images": "3"}, {"size": None}])
def test_a_broken_record_is_one_line(part, small, tmp_path):
    copy = tmp_path / "copy"
    shrink(small, copy, 24, on_error="skip", most_damaged=1)
    record = json.loads((copy / "shrink.json").read_text())
    record["shards"]["a/000000.tar"] = part and record["shards"]["a/000000.tar"] | part
    (copy / "shrink.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="is no copy that this command has finished"):
        shrink(small, copy, 24)


def test_a_full_disk_and_a_lost_process_are_one_line(small, tmp_path, monkeypatch):
    photo(0).save(small / "b/2.jpg")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(copying.os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*a/000000\.tar: No space left on device; the same command"):
        shrink(small, tmp_path / "copy", 24)
    assert not list((tmp_path / ".copy.part").rglob("*tar*"))
    monkeypatch.undo()
    monkeypatch.setattr(copying, "shrink_image", end)
    with pytest.raises(UserError, match="a process that reads images of .* has ended"):
        shrink(small, tmp_path / "copy", 24)
    monkeypatch.undo()
    assert not shrink(small, tmp_path / "copy", 24).problems


def end(*arguments):
    """As the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_few_results_wait():
    class Pool:
        waiting = most = 0

        def submit(self, work, task):
            self.waiting += 1
            self.most = max(self.most, self.waiting)
            return self

        def result(self):
            self.waiting -= 1
            return [self.waiting]

    pool = Pool()
    assert len(list(in_order(pool, None, range(50), 6))) == 50 and pool.most == 6 and pool.waiting == 0
