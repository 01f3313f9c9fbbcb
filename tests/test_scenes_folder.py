"""The data set of built-in scenes: its files in three layouts, repeatable, complete, and never over other data."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semaim.data import scenes
from semaim.data.scenes import LEVELS, make_scene, write_scenes

IMAGES, SIZE, SEED = 100, 48, 3
UNLABELLED = {"unlabelled": 7, "unlabelled_size": 40}
ROOT = Path(scenes.__file__).parents[2]


def digest(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def run(*arguments):
    command = [sys.executable, "-m", "semaim.data.scenes", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module", params=LEVELS)
def level(request):
    return request.param


@pytest.fixture(scope="module")
def folder(level, tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "data"
    assert write_scenes(root, IMAGES, SIZE, SEED, level=level, **UNLABELLED)
    return root


@pytest.mark.parametrize("start", [False, True])
def test_run_lengths(start):
    mask = np.zeros((4, 3), bool)
    mask[1:3, 1] = True
    mask[0, 0] = start
    counts = scenes.rle(mask)["counts"]
    values = np.repeat(np.arange(len(counts)) % 2, counts)
    assert np.array_equal(values.reshape(4, 3, order="F"), mask)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_coco_masks_equal_the_scenes(folder, level):
    coco = pytest.importorskip("pycocotools.coco", reason="no pycocotools: runs after tools/setup.sh --extras all")
    for split, count in (("train", 80), ("val", 20)):
        data = coco.COCO(folder / "coco" / "annotations" / f"instances_{split}2017.json")
        assert sorted(data.getImgIds()) == list(range(1, count + 1))
        assert [c["name"] for c in data.loadCats(sorted(data.getCatIds()))] == list(LEVELS[level].classes)
        assert sorted(data.getCatIds()) == list(range(1, len(LEVELS[level].classes) + 1))
        assert min(data.getAnnIds()) == 1
        for number, info in data.imgs.items():
            scene = make_scene(SEED, number - 1, SIZE, split, level)
            found = data.loadAnns(data.getAnnIds(imgIds=number))
            assert len(found) == len(scene.objects)
            for annotation, item in zip(found, scene.objects, strict=True):
                assert np.array_equal(data.annToMask(annotation), item.mask)
                assert annotation["category_id"] == item.category
                assert tuple(annotation["bbox"]) == item.box
                assert annotation["area"] == item.mask.sum() and annotation["iscrowd"] == 0
            with Image.open(folder / "coco" / f"{split}2017" / info["file_name"]) as image:
                assert image.size == (info["width"], info["height"]) == (SIZE, SIZE)


def test_ade_maps(folder, level):
    classes = LEVELS[level].classes
    for split, name in (("train", "training"), ("val", "validation")):
        paths = sorted((folder / "ade" / "annotations" / name).glob("*.png"))
        images = sorted((folder / "ade" / "images" / name).glob("*.jpg"))
        assert [p.stem for p in paths] == [p.stem for p in images] and paths
        for index, path in enumerate(paths):
            with Image.open(path) as image:
                assert image.mode == "L"
                values = np.asarray(image)
            assert values.max() == len(classes) + 1
            assert np.array_equal(values, make_scene(SEED, index, SIZE, split, level).semantic)
    lines = (folder / "ade" / "objectInfo.txt").read_text().splitlines()
    assert lines[1:] == [f"{i}\t{n}" for i, n in enumerate((*classes, "background"), 1)]


def test_class_folders_hold_the_same_pictures_by_main_object(folder, level):
    classes = list(LEVELS[level].classes)
    for split, ade in (("train", "training"), ("val", "validation")):
        root = folder / "classes" / split
        assert sorted(p.name for p in root.iterdir()) == classes
        for name in classes:
            paths = list((root / name).iterdir())
            assert paths, f"no {name} in {split}"
            for path in paths:
                assert make_scene(SEED, int(path.stem) - 1, SIZE, split, level).main.name == name
                same = path.read_bytes()
                assert (folder / "coco" / f"{split}2017" / path.name).read_bytes() == same
                assert (folder / "ade" / "images" / ade / path.name).read_bytes() == same


def test_unlabelled_images_are_scenes_of_their_own(folder, level):
    paths = sorted((folder / "unlabelled").iterdir())
    assert [path.name for path in paths] == [f"{number:06d}.jpg" for number in range(1, 8)]
    for index, path in enumerate(paths):
        with Image.open(path) as image:
            found = np.asarray(image).astype(int)
        # Against the scene before compression, and against that of another number.
        near, other = (make_scene(SEED, i, 40, "unlabelled", level).image for i in (index, index + 1))
        assert np.abs(found - near).mean() < 15 < np.abs(found - other).mean()


def test_readme_names_the_source(folder, level):
    text = (folder / "README.txt").read_text()
    command = f"--images {IMAGES} --size {SIZE} --seed {SEED} --val-fraction 0.2 --level {level} --unlabelled 7"
    for part in ("OpenMoji", "CC BY-SA 4.0", "openmoji.org", command, f"level {level}", "unlabelled/ "):
        assert part in text
    assert ", ".join(LEVELS[level].classes) in text


def test_same_bytes_with_more_workers_and_without_hard_links(tmp_path, monkeypatch, level):
    asked = {"level": level, "unlabelled": 5}
    write_scenes(tmp_path / "two", 12, 32, 5, workers=2, **asked)

    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    write_scenes(tmp_path / "one", 12, 32, 5, **asked)
    write_scenes(tmp_path / "other", 12, 32, 6, **asked)
    assert digest(tmp_path / "one") == digest(tmp_path / "two") != digest(tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "other", "two"]


@pytest.mark.parametrize(("images", "fraction", "val"), [(1, 0.2, 0), (2, 0.2, 1), (3, 0.99, 2), (4, 0, 0)])
def test_split_counts(tmp_path, images, fraction, val):
    write_scenes(tmp_path / "d", images, 32, val_fraction=fraction)
    assert len(list((tmp_path / "d/coco/train2017").iterdir())) == images - val
    assert len(list((tmp_path / "d/coco/val2017").iterdir())) == val


def test_second_run_is_already_there(folder, level):
    asked = {"images": IMAGES, "size": SIZE, "seed": SEED, "level": level, **UNLABELLED}
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert write_scenes(folder, **asked) is False
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    other = {"easy": "normal", "normal": "easy"}[level]
    for change in ({"seed": SEED + 1}, {"level": other}, {"unlabelled": 8}, {"unlabelled_size": 48}):
        with pytest.raises(FileExistsError, match="another request"):
            write_scenes(folder, **{**asked, **change})


def test_a_folder_from_before_the_levels_is_a_normal_one(tmp_path):
    folder = tmp_path / "d"
    write_scenes(folder, 3, 32)
    old = {"generator": 1, "images": 3, "size": 32, "seed": 0, "val_fraction": 0.2}
    (folder / scenes.MARKER).write_text(json.dumps(old))
    assert write_scenes(folder, 3, 32) is False
    for change in ({"level": "easy"}, {"unlabelled": 1}):
        with pytest.raises(FileExistsError, match="another request"):
            write_scenes(folder, 3, 32, **change)


def test_a_size_of_no_unlabelled_images_changes_nothing(tmp_path):
    assert write_scenes(tmp_path / "d", 3, 32, unlabelled_size=64)
    assert not (tmp_path / "d" / "unlabelled").exists()
    assert write_scenes(tmp_path / "d", 3, 32) is False


@pytest.mark.parametrize("marker", [None, "not json", "[]"])
def test_foreign_folder_is_refused_and_kept(tmp_path, marker):
    (tmp_path / "notes.txt").write_text("mine")
    if marker is not None:
        (tmp_path / scenes.MARKER).write_text(marker)
    before = digest(tmp_path)
    with pytest.raises(FileExistsError):
        write_scenes(tmp_path, 4, 32)
    assert digest(tmp_path) == before


def test_empty_folder_is_filled_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    target = tmp_path / "data"
    target.mkdir()

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(scenes, "make_scene", fail)
        with pytest.raises(OSError, match="disk full"):
            write_scenes(target, 4, 32)
    assert list(tmp_path.iterdir()) == [target] and not list(target.iterdir())
    assert write_scenes(target, 4, 32)
    assert list(tmp_path.iterdir()) == [target]


def drawing(target, *options):
    """The command on many scenes, which has drawn some; and the folder that it fills."""
    line = [sys.executable, "-m", "semaim.data.scenes", str(target), "--images", "20000", "--size", "64", *options]
    child = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    while not any(folder := sorted(target.parent.glob(f".{target.name}.*.part"))) or not any(folder[-1].rglob("*.jpg")):
        assert child.poll() is None
        time.sleep(0.05)
    return child, folder[-1]


def test_what_a_killed_command_leaves_is_removed_by_the_next_and_not_while_it_runs(tmp_path):
    target = tmp_path / "data"
    child, left = drawing(target)
    assert write_scenes(target, 4, 32)
    assert left.is_dir() and child.poll() is None
    child.kill()
    child.communicate()
    shutil.rmtree(target)
    assert left.is_dir() and write_scenes(target, 4, 32)
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc: runs on Linux")
def test_a_killed_process_of_several_ends_the_command_in_a_line(tmp_path):
    child, _ = drawing(tmp_path / "data", "--workers", "2")
    numbers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    lines = {int(number): Path(f"/proc/{number}/cmdline").read_text() for number in numbers}
    os.kill(next(number for number, line in lines.items() if "spawn_main" in line), signal.SIGKILL)
    _, said = child.communicate()
    assert child.returncode == 2 and said.count("\n") == 1 and "out of memory" in said, said
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path):
    arguments = (tmp_path / "d", "--images", 6, "--size", 32, "--seed", 1)
    first, second = run(*arguments, "--workers", 2), run(*arguments, "--workers", 1)
    assert first.returncode == 0 and "6 scenes written" in first.stdout, first.stderr
    assert second.returncode == 0 and "already there" in second.stdout
    instances = json.loads((tmp_path / "d/coco/annotations/instances_train2017.json").read_text())
    assert len(instances["images"]) == 5
    for place, level in ((tmp_path, "normal"), (tmp_path / "d", "easy")):
        refused = run(place, "--images", 6, "--size", 32, "--seed", 1, "--level", level)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and str(place) in refused.stderr


def test_command_line_with_level_and_unlabelled(tmp_path):
    more = ("--level", "easy", "--unlabelled", 3, "--unlabelled-size", 40)
    done = run(tmp_path / "d", "--images", 6, "--size", 32, *more, "--workers", 2)
    assert done.returncode == 0 and "6 scenes and 3 unlabelled written" in done.stdout, done.stderr
    instances = json.loads((tmp_path / "d/coco/annotations/instances_val2017.json").read_text())
    assert [category["id"] for category in instances["categories"]] == list(range(1, 11))
    assert {Image.open(path).size for path in (tmp_path / "d/unlabelled").iterdir()} == {(40, 40)}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--images", "0"], "images"),
        (["--images", "4", "--size", "31"], "size"),
        (["--images", "4", "--size", "99999"], "size"),
        (["--images", "4", "--seed", "-1"], "seed"),
        (["--images", "4", "--val-fraction", "nan"], "fraction"),
        (["--images", "4", "--workers", "0"], "workers"),
        (["--images", "4", "--level", "simple"], "level must be one of easy, normal, not 'simple'"),
        (["--images", "4", "--unlabelled", "-1"], "unlabelled"),
        (["--images", "4", "--unlabelled", "1", "--unlabelled-size", "8"], "size"),
    ],
)
def test_bad_values_get_one_line(tmp_path, capsys, options, word):
    assert scenes.main([str(tmp_path / "d"), *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and word in error
    assert not (tmp_path / "d").exists()


def test_bad_arguments_in_a_process(tmp_path):
    for options in (["--images", "many"], [], ["--images", "4", "--size", "8"]):
        result = run(tmp_path / "d", *options)
        assert result.returncode == 2 and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
