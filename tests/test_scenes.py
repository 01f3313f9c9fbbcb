import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semaim.data import scenes
from semaim.data.scenes import BACKGROUND, CLASSES, GLYPHS, SPLITS, make_scene, write_scenes

IMAGES, SIZE, SEED = 100, 48, 3
ROOT = Path(scenes.__file__).parents[2]


def digest(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def run(*arguments):
    command = [sys.executable, "-m", "semaim.data.scenes", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "data"
    assert write_scenes(root, IMAGES, SIZE, SEED)
    return root


@pytest.fixture(scope="module")
def sample():
    return [make_scene(SEED, index, 64, split) for split in SPLITS for index in range(60)]


def test_every_glyph_is_in_the_font():
    missing, _ = scenes.render_glyph("\U0010fffe")
    for glyph in "".join(GLYPHS.values()):
        image, area = scenes.render_glyph(glyph)
        assert area > 5000, glyph
        assert image.size != missing.size or image.tobytes() != missing.tobytes(), glyph
        assert len(image.getcolors(1 << 18)) > 20, f"{glyph} has no colour layers"
    assert len(set("".join(GLYPHS.values()))) == len("".join(GLYPHS.values()))
    assert list(CLASSES) == sorted(CLASSES)


def test_make_scene_is_repeatable_and_depends_on_every_argument():
    base = make_scene(1, 2, 64, "train")
    assert np.array_equal(base.image, make_scene(1, 2, 64, "train").image)
    for other in ((2, 2, 64, "train"), (1, 22, 64, "train"), (1, 2, 64, "val")):
        assert not np.array_equal(base.image, make_scene(*other).image)
    assert base.image.shape == (64, 64, 3) and base.image.dtype == np.uint8


@pytest.mark.parametrize("size", [32, 97])
def test_other_sizes(size):
    for index in range(len(CLASSES)):
        scene = make_scene(0, index, size, "train")
        assert scene.image.shape == (size, size, 3) and scene.semantic.shape == (size, size)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [((0, 0, 31, "train"), "size"), ((0, 0, 64, "test"), "split"), ((-1, 0, 64, "val"), "negative")],
)
def test_make_scene_refuses(arguments, word):
    with pytest.raises(ValueError, match=word):
        make_scene(*arguments)


def test_boxes_are_tight(sample):
    for scene in sample:
        for item in scene.objects:
            x, y, width, height = item.box
            rows, columns = np.nonzero(item.mask)
            assert (x, y) == (columns.min(), rows.min())
            assert (x + width - 1, y + height - 1) == (columns.max(), rows.max())
            assert item.mask.sum() >= scenes.MIN_PIXELS


def test_semantic_map_is_the_union_of_the_visible_masks(sample):
    for scene in sample:
        total = np.zeros(scene.semantic.shape, int)
        for item in scene.objects:
            assert (scene.semantic[item.mask] == item.category).all()
            total += item.mask
        assert total.max() <= 1
        assert np.isin(scene.semantic[total == 0], (0, BACKGROUND)).all()


def test_main_object_is_the_largest_and_mostly_visible(sample):
    for number, scene in enumerate(sample):
        assert scene.main.category == number % 60 % len(CLASSES) + 1
        assert scene.main.name == CLASSES[scene.main.category - 1]
        shown = scene.main.mask.sum()
        others = [item.mask.sum() for item in scene.objects if item is not scene.main]
        assert shown > 1.5 * max(others, default=0)
        _, area = scenes.render_glyph(scene.main.glyph)
        assert shown > 0.6 * area * scene.main.scale**2


def test_occlusion_and_small_objects_occur(sample):
    counts = [len(scene.objects) for scene in sample]
    assert min(counts) == 1 and max(counts) >= 4
    hidden = 0
    for scene in sample:
        for item in scene.objects:
            hidden += item.mask.sum() < 0.85 * scenes.render_glyph(item.glyph)[1] * item.scale**2
    assert hidden > 20
    assert any((scene.semantic == 0).any() for scene in (make_scene(0, i, 32, "train") for i in range(200)))


def test_splits_share_no_drawing(sample):
    drawn = [
        {(o.glyph, o.scale, o.rotation, o.flip) for scene in part for o in scene.objects}
        for part in (sample[:60], sample[60:])
    ]
    assert len(drawn[0]) > 100 and len(drawn[1]) > 100
    assert drawn[0].isdisjoint(drawn[1])


@pytest.mark.parametrize("start", [False, True])
def test_run_lengths(start):
    mask = np.zeros((4, 3), bool)
    mask[1:3, 1] = True
    mask[0, 0] = start
    counts = scenes.rle(mask)["counts"]
    values = np.repeat(np.arange(len(counts)) % 2, counts)
    assert np.array_equal(values.reshape(4, 3, order="F"), mask)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_coco_masks_equal_the_scenes(folder):
    coco = pytest.importorskip("pycocotools.coco")
    for split, count in (("train", 80), ("val", 20)):
        data = coco.COCO(folder / "coco" / "annotations" / f"instances_{split}2017.json")
        assert sorted(data.getImgIds()) == list(range(1, count + 1))
        assert [c["name"] for c in data.loadCats(sorted(data.getCatIds()))] == list(CLASSES)
        assert min(data.getAnnIds()) == 1
        for number, info in data.imgs.items():
            scene = make_scene(SEED, number - 1, SIZE, split)
            found = data.loadAnns(data.getAnnIds(imgIds=number))
            assert len(found) == len(scene.objects)
            for annotation, item in zip(found, scene.objects, strict=True):
                assert np.array_equal(data.annToMask(annotation), item.mask)
                assert annotation["category_id"] == item.category
                assert tuple(annotation["bbox"]) == item.box
                assert annotation["area"] == item.mask.sum() and annotation["iscrowd"] == 0
            with Image.open(folder / "coco" / f"{split}2017" / info["file_name"]) as image:
                assert image.size == (info["width"], info["height"]) == (SIZE, SIZE)


def test_ade_maps(folder):
    for split, name in (("train", "training"), ("val", "validation")):
        paths = sorted((folder / "ade" / "annotations" / name).glob("*.png"))
        images = sorted((folder / "ade" / "images" / name).glob("*.jpg"))
        assert [p.stem for p in paths] == [p.stem for p in images] and paths
        for index, path in enumerate(paths):
            with Image.open(path) as image:
                assert image.mode == "L"
                values = np.asarray(image)
            assert values.max() <= BACKGROUND
            assert np.array_equal(values, make_scene(SEED, index, SIZE, split).semantic)
    lines = (folder / "ade" / "objectInfo.txt").read_text().splitlines()
    assert lines[1:] == [f"{i}\t{n}" for i, n in enumerate((*CLASSES, "background"), 1)]


def test_class_folders_hold_the_same_pictures_by_main_object(folder):
    for split, ade in (("train", "training"), ("val", "validation")):
        root = folder / "classes" / split
        assert sorted(p.name for p in root.iterdir()) == list(CLASSES)
        for name in CLASSES:
            paths = list((root / name).iterdir())
            assert paths, f"no {name} in {split}"
            for path in paths:
                assert make_scene(SEED, int(path.stem) - 1, SIZE, split).main.name == name
                same = path.read_bytes()
                assert (folder / "coco" / f"{split}2017" / path.name).read_bytes() == same
                assert (folder / "ade" / "images" / ade / path.name).read_bytes() == same


def test_readme_names_the_source(folder):
    text = (folder / "README.txt").read_text()
    command = f"--images {IMAGES} --size {SIZE} --seed {SEED}"
    for part in ("OpenMoji", "CC BY-SA 4.0", "openmoji.org", command):
        assert part in text
    assert ", ".join(CLASSES) in text


def test_same_bytes_with_more_workers_and_without_hard_links(tmp_path, monkeypatch):
    write_scenes(tmp_path / "two", 12, 32, 5, workers=2)

    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    write_scenes(tmp_path / "one", 12, 32, 5)
    write_scenes(tmp_path / "other", 12, 32, 6)
    assert digest(tmp_path / "one") == digest(tmp_path / "two") != digest(tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "other", "two"]


@pytest.mark.parametrize(("images", "fraction", "val"), [(1, 0.2, 0), (2, 0.2, 1), (3, 0.99, 2), (4, 0, 0)])
def test_split_counts(tmp_path, images, fraction, val):
    write_scenes(tmp_path / "d", images, 32, val_fraction=fraction)
    assert len(list((tmp_path / "d/coco/train2017").iterdir())) == images - val
    assert len(list((tmp_path / "d/coco/val2017").iterdir())) == val


def test_second_run_is_already_there(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert write_scenes(folder, IMAGES, SIZE, SEED) is False
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(FileExistsError, match="another request"):
        write_scenes(folder, IMAGES, SIZE, SEED + 1)


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


def test_command_line(tmp_path):
    arguments = (tmp_path / "d", "--images", 6, "--size", 32, "--seed", 1)
    first, second = run(*arguments, "--workers", 2), run(*arguments, "--workers", 1)
    assert first.returncode == 0 and "6 scenes written" in first.stdout, first.stderr
    assert second.returncode == 0 and "already there" in second.stdout
    instances = json.loads((tmp_path / "d/coco/annotations/instances_train2017.json").read_text())
    assert len(instances["images"]) == 5
    refused = run(tmp_path, "--images", 6, "--size", 32)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and str(tmp_path) in refused.stderr


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--images", "0"], "images"),
        (["--images", "4", "--size", "31"], "size"),
        (["--images", "4", "--size", "99999"], "size"),
        (["--images", "4", "--seed", "-1"], "seed"),
        (["--images", "4", "--val-fraction", "nan"], "fraction"),
        (["--images", "4", "--workers", "0"], "workers"),
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
