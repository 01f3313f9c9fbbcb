"""Data of one's own: which folder is what, pairs of images and label maps, the held-out share, the YAML."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from semaim.data import labelled
from semaim.data.described import (
    KEYS,
    as_yaml,
    check_description,
    classes_and_values,
    ignored_values,
    read_description,
    renumbered,
    unclear,
)
from semaim.data.describing import describe
from semaim.data.layouts import IMAGES, LABELS, SPLITS, NotFound, find_coco, find_maps
from semaim.data.pairs import check_apart, draw_of, held_out, label_suffix_of, pair_up, part_of
from semaim.errors import UserError

WORDS = st.text("abcdefgh012", min_size=1, max_size=6)


@pytest.fixture
def tree(tmp_path):
    """Writes empty files below a new folder, and returns it."""

    def write(*names, content=b""):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return str(tmp_path)

    return write


# Layouts


@settings(max_examples=40, deadline=None)
@given(
    images=st.sampled_from(IMAGES), labels=st.sampled_from(LABELS), upper=st.booleans(), outside=st.booleans(),
    train=st.sampled_from(SPLITS["train"]), val=st.sampled_from((*SPLITS["val"], None)), flat=st.booleans(),
    other=st.lists(st.sampled_from(("notes", "test", "depth", ".git")), unique=True),
)  # fmt: skip
def test_every_made_up_tree_is_found_as_it_was_made(images, labels, upper, outside, train, val, flat, other):
    images, labels = (name.upper() if upper else name for name in (images, labels))
    parts = {"train": train} | ({"val": val} if val else {})
    expected = {
        name: {key: f"{split}/{side}" if outside else f"{side}/{split}"
               for key, side in (("images", images), ("labels", labels))}
        for name, split in parts.items()
    }  # fmt: skip
    if flat:
        expected = {"train": {"images": images, "labels": labels}}
    with tempfile.TemporaryDirectory() as root:
        for part in expected.values():
            for folder in part.values():
                os.makedirs(os.path.join(root, folder))
        for folder in other:
            os.makedirs(os.path.join(root, folder))
        assert find_maps(root) == {"root": root, **expected}


def test_two_readings_are_refused_with_both_and_the_yaml_to_write(tree):
    root = tree("images/a.jpg", "labels/a.png", "masks/a.png")
    with pytest.raises(UserError) as caught:
        find_maps(root)
    text = str(caught.value)
    assert "can be read in 2 ways" in text and "images with labels" in text and "images with masks" in text
    written = yaml.safe_load(text[text.index("{") : text.rindex("}") + 1])
    assert check_description(written, "the error") == {"root": root, "train": {"images": "images", "labels": "labels"}}


def test_what_is_no_layout_says_what_is_looked_for(tree):
    with pytest.raises(NotFound, match="a folder of images .* beside one of label maps"):
        find_maps(tree("cats/a.jpg"))
    with pytest.raises(NotFound, match="no COCO annotation file"):
        find_coco(tree("notes.json", content=b"{}"))


def test_vocs_lists_decide(tree):
    lists = [f"ImageSets/Segmentation/{name}.txt" for name in ("train", "val", "trainval")]
    root = tree("JPEGImages/a.jpg", "SegmentationClass/a.png", *lists)
    found = find_maps(root)
    assert found["train"] == {"images": "JPEGImages", "labels": "SegmentationClass", "list": lists[0]}
    assert found["val"]["list"] == lists[1]
    os.remove(Path(root) / lists[1])
    found = find_maps(root)
    assert "val" not in found and found["train"]["list"] == lists[0]


COCO = (
    '{"images": [{"id": 1, "file_name": "%s"}], "annotations": [{"id": 1}],'
    ' "categories": [{"id": 9, "name": "cat"}, {"id": 31, "name": "dog"}]}'
)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["labels.json", "photos/a.jpg"], {"train": "photos labels.json"}),
        (["annotations/instances_default.json", "a.jpg"], {"train": ". annotations/instances_default.json"}),
        (
            ["annotations/instances_train2017.json", "annotations/captions_train2017.json", "train2017/a.jpg",
             "annotations/instances_val2017.json", "images/val2017/b.jpg"],
            {"train": "train2017 annotations/instances_train2017.json",
             "val": "images/val2017 annotations/instances_val2017.json"},
        ),
        (
            ["train/_annotations.coco.json", "train/a.jpg", "valid/_annotations.coco.json", "valid/b.jpg",
             "test/_annotations.coco.json", "test/c.jpg"],
            {"train": "train train/_annotations.coco.json", "val": "valid valid/_annotations.coco.json"},
        ),
    ],
)  # fmt: skip
def test_annotation_files_and_the_folders_of_their_images(tree, files, expected):
    for file in files:
        name = "b.jpg" if "val" in file else "c.jpg" if "test" in file else "a.jpg"
        root = tree(file, content=(COCO % name).encode() if file.endswith(".json") else b"")
    found = find_coco(root)
    assert {key: " ".join(part.values()) for key, part in found.items() if key != "root"} == expected
    if "val" in expected:
        assert describe("annotations", root)["classes"] == ["cat", "dog"]
    else:
        with pytest.raises(UserError, match="has one image: none can be held out"):
            describe("annotations", root)


def test_images_in_two_folders_and_two_training_files_are_refused(tree):
    root = tree("labels.json", content=(COCO % "a.jpg").encode())
    with pytest.raises(UserError, match="holds all its 1 images: none of them is there, such as a.jpg"):
        find_coco(root)
    tree("one/a.jpg", "two/a.jpg")
    with pytest.raises(UserError, match="2 folders hold all its images, one, two: .*--data FILE.yaml"):
        find_coco(root)
    shutil.rmtree(Path(root) / "two")
    tree("more.json", content=(COCO % "a.jpg").encode())
    with pytest.raises(
        UserError, match="can be read in 2 ways: train from one with labels.json; or train from one with"
    ):
        find_coco(root)


# Pairs


@settings(max_examples=40, deadline=None)
@given(
    names=st.lists(WORDS, min_size=1, max_size=8, unique=True), end=st.sampled_from(("", "_mask", "-L")),
    image=st.sampled_from((".jpg", ".JPEG", ".png", ".tif")), label=st.sampled_from((".png", ".tif", ".bmp")),
    inner=st.booleans(),
)  # fmt: skip
def test_pairs_are_those_of_equal_names_whatever_the_suffix(names, end, image, label, inner):
    names = [f"x{name}y" for name in names]
    with tempfile.TemporaryDirectory() as root:
        for folder, suffix in (("i", image), ("l", end + label)):
            for place, name in enumerate(names):
                file = Path(root, folder, "deep" if inner and place % 2 else "", name + suffix)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
        folders = os.path.join(root, "i"), os.path.join(root, "l")
        suffix = label_suffix_of(*folders)
        assert suffix == (end + label if end else None)
        pairs, bare = pair_up(*folders, label_suffix=suffix)
        stems = [(Path(a).name.removesuffix(image), Path(b).name.removesuffix(end + label)) for a, b in pairs]
        assert sorted(a for a, _ in stems) == sorted(names) and all(a == b for a, b in stems) and not bare


def test_what_does_not_pair_is_said(tree):
    root = tree("i/a.jpg", "i/b.jpg", "l/a.png")
    assert pair_up(f"{root}/i", f"{root}/l")[1] == ["b.jpg"]
    tree("l/c.png")
    with pytest.raises(UserError, match="1 of 2 label maps in .* have no image in .*: c.png"):
        pair_up(f"{root}/i", f"{root}/l")
    with pytest.raises(UserError, match="names d, which is not in"):
        pair_up(f"{root}/i", f"{root}/l", tree("list.txt", content=b"a\nd\n") + "/list.txt")
    assert len(pair_up(f"{root}/i", f"{root}/l", tree("list.txt", content=b"a\n") + "/list.txt")[0]) == 1
    tree("i/a.png")
    with pytest.raises(UserError, match="have the same name"):
        pair_up(f"{root}/i", f"{root}/l")
    with pytest.raises(UserError, match="1 images are trained on and validated on"):
        check_apart([f"{root}/i/a.jpg"], [f"{root}/i/../i/a.jpg"], "here")


# Held out


@given(st.lists(WORDS, min_size=2, max_size=60, unique=True), st.floats(0.05, 0.95), st.randoms())
def test_the_parts_are_apart_complete_and_do_not_depend_on_the_order(names, share, random):
    train, val = part_of(names, "train", share), part_of(names, "val", share)
    assert train and val and train | val == set(names) and not train & val
    shuffled = random.sample(names, len(names))
    assert held_out(shuffled, share) == val


@given(st.sets(WORDS, min_size=40, max_size=80), st.sets(WORDS, max_size=20), st.floats(0.2, 0.8))
def test_adding_images_moves_none(names, more, share):
    before, after = held_out(names, share), held_out(names | more, share)
    moved = (before ^ after) & names
    # Only the smallest and the largest draw may move, where one of the parts would be empty.
    drawn = sorted(names, key=draw_of)
    assert moved <= {drawn[0], drawn[-1]}
    if draw_of(drawn[0]) < share <= draw_of(drawn[-1]):
        assert not moved


def test_the_share_is_held_out_and_the_suffix_does_not_matter():
    names = [f"photo{number:05}.jpg" for number in range(5000)]
    assert abs(len(held_out(names)) / 5000 - 0.2) < 0.02
    assert draw_of("a/b.jpg") == draw_of("a/b.png") != draw_of("b.jpg")


def test_flat_class_folders_are_divided_within_each_class(tree):
    root = tree(*(f"{name}/{number}.jpg" for name in ("cat", "dog") for number in range(12)))
    found = {split: labelled.find_labelled(root, split) for split in ("train", "val")}
    paths = {split: set(part[0]) for split, part in found.items()}
    assert not paths["train"] & paths["val"] and len(paths["train"] | paths["val"]) == 24
    assert all(part[2] == ["cat", "dog"] and set(part[1]) == {0, 1} for part in found.values())
    tree("eel/1.jpg")
    with pytest.raises(UserError, match="eel has one image"):
        labelled.find_labelled(root, "train")


def test_other_layouts_are_no_flat_class_folders(tree):
    assert not labelled.is_flat(tree("images/a.jpg", "labels/a.png"))
    with pytest.raises(UserError, match="no such folder: .*train"):
        labelled.find_labelled(tree("cat/a.jpg", "val/dog/b.jpg"), "train")


# The YAML


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clases: [a, b]", "unknown key clases: did you mean classes"),
        ("train: {image: a, labels: b}", "train: unknown key image: did you mean images"),
        ("train: {images: a}", "train: give either labels, .*, or annotations"),
        ("train: {labels: a}", "train lacks images"),
        ("train: [a]", "train is .*: give {images: DIR, labels: DIR}"),
        ("classes: road", "classes is 'road': give a list of names, or value: name"),
        ("classes: [yes, b]", "each a text \\(in quotes"),
        ("classes: [a, a]", "'a' is named twice"),
        ("classes: {road: 1}", "'road' is no value from 0 to 255"),
        ("classes: {road: [128, 64, 128]}", "classes by colour are not read"),
        ("classes: {0: a, 255: b}", "the value 255 is a class and ignored"),
        ("ignored: 255", "ignored is 255: give a list of values"),
        ("palette: [[1, 2]]", "palette: give a list of colours"),
        ("{classes: [a, b], palette: [[1, 2, 3]]}", "palette has 1 colours, there are 2 classes"),
        ("held_out: 20", "held_out is 20: give a share"),
        ("root: 3", "root is 3: give a text"),
        ("{val: {images: a, labels: b}, held_out: 0.1}", "held_out is for a data set without val"),
        ("!!python/object/apply:os.getcwd []", "is no YAML"),
        ("[1", "is no YAML"),
        ("classes: {0: a, 7: b, 7: c}", "is no YAML: 7 is given twice"),
        ("{root: a, train: {images: a, labels: b}, root: b}", "'root' is given twice"),
        ("{[1]: a}", "is no YAML"),
        ("", "give keys and values"),
        ("root: \xe4", "no text in UTF-8: save it as UTF-8"),
    ],
)
def test_a_wrong_yaml_is_one_line_that_names_the_key(tree, text, message):
    file = tree("data.yaml", content=text.encode("latin-1")) + "/data.yaml"
    with pytest.raises(UserError, match=message) as caught:
        read_description(file)
    assert "\n" not in str(caught.value) and file in str(caught.value)


NAMES = st.text("abc xyz'\"é:#", min_size=1, max_size=8).filter(lambda name: name.strip())
DESCRIPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "root": NAMES,
        "train": st.fixed_dictionaries({"images": NAMES, "labels": NAMES}, optional={"list": NAMES}),
        "classes": st.lists(NAMES, min_size=2, max_size=5, unique=True)
        | st.dictionaries(st.integers(0, 254), NAMES, min_size=1, max_size=5),
        "held_out": st.floats(0.01, 0.99),
        "label_suffix": NAMES,
    },
)


@given(DESCRIPTIONS, st.booleans())
def test_what_is_printed_is_read_again(description, flat):
    text = as_yaml(description, flat)
    assert check_description(yaml.safe_load(text), "text") == description if description else text == "{}" * flat
    assert set(description) <= set(KEYS) and (not flat or "\n" not in text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{train: {images: images, labels: mask}}", "train: labels: no such folder: .*mask"),
        ("{train: {images: images, labels: labels, list: no.txt}}", "train: list: no such file"),
        ("{val: {images: images, labels: labels}}", "it has val and no train"),
        ("{train: {images: images, annotations: labels}}", "train has no labels, which the config reads"),
        ("{train: {images: images, labels: labels}}", "name the classes of the label maps"),
    ],
)
def test_what_a_yaml_names_has_to_be_there(tree, content, message):
    root = tree("images/a.jpg", "labels/a.png", "images/b.jpg", "labels/b.png")
    file = tree("data.yaml", content=content.encode()) + "/data.yaml"
    with pytest.raises(UserError, match=message):
        describe("labels", root, file)


# Values


@given(
    st.lists(st.sets(st.integers(0, 255), min_size=1, max_size=4), min_size=1, max_size=6),
    st.sets(st.integers(0, 255), max_size=4),
)
def test_each_value_becomes_its_class_or_none(groups, ignored):
    seen: set[int] = set()
    values = [sorted(kept) for group in groups if (kept := group - seen) and not seen.update(group)]
    ignored = sorted(ignored - seen)
    table = renumbered(values, ignored)
    for value in range(256):
        number = table.get(value, value)  # as mmseg writes it
        owner = next((place for place, group in enumerate(values) if value in group), None)
        if owner is not None:
            assert number == owner
        else:
            assert number == 255 if value in ignored else len(values) <= number != 255


@pytest.mark.parametrize(
    ("classes", "pixels", "message"),
    [
        (["a", "b"], {0: 5, 1: 5, 255: 1}, None),
        (["a", "b"], {1: 5}, None),
        (["a", "b"], {0: 5, 2: 5}, "0 \\(50.0%\\), 2 \\(50.0%\\).* 2 is none of them.*classes: {0: NAME, 2: NAME}"),
        (["a", "b", "c"], {1: 1, 2: 1, 3: 1}, "3 is none of them"),
        (["rest", "crack"], {0: 5, 255: 1}, "if 255 is crack, give this name alone, as --classes crack"),
        (["a", "b"], {0: 5, 300: 1}, "semaim convert-labels values MAPS OUT 300=NEW"),
        (["crack"], {0: 5, 255: 1}, None),
        (["crack"], {0: 5, 1: 1}, None),
        (["crack"], {0: 5, 1: 1, 255: 1}, "1 and 255 both occur"),
        (["crack"], {0: 5, 128: 1, 255: 1}, "128 is none of them"),
        ({0: "road", 7: "car", 8: "car"}, {0: 1, 7: 1, 8: 1, 255: 1}, None),
        ({0: "road", 7: "car"}, {0: 1, 1: 1, 7: 1}, "0 road, 7 car, ignored 255, so 1 is none of them"),
    ],
)
def test_values_that_are_not_certain_are_refused(classes, pixels, message):
    names, values = classes_and_values({"classes": classes})
    found = unclear(values, ignored_values({"classes": classes}), names, pixels)
    if message is None:
        assert found is None
    else:
        with pytest.raises(UserError, match=message):
            raise UserError(found)


def test_colours_of_paletted_label_maps_if_they_can_be_told_apart(tree):
    root = tree("images/a.jpg", "images/b.jpg", "labels/x")
    for name, colours in (("a", [10, 0, 0, 0, 200, 0]), ("b", [0, 0, 0, 1, 1, 1])):
        label = Image.new("P", (4, 4))
        label.putpalette(colours)
        label.save(f"{root}/labels/{name}.png")
    assert describe("labels", root, None, ["x", "y"])["palette"] == [[10, 0, 0], [0, 200, 0]]
    shutil.copy(f"{root}/labels/b.png", f"{root}/labels/a.png")
    assert "palette" not in describe("labels", root, None, ["x", "y"])


# What labelling tools write


def test_vocs_folder_of_xml_files_is_none_of_label_maps(tree):
    root = tree("JPEGImages/a.jpg", "SegmentationClass/a.png", "Annotations/a.xml", "ImageSets/Segmentation/train.txt")
    assert find_maps(root)["train"]["labels"] == "SegmentationClass"


@pytest.mark.parametrize(
    ("files", "listed", "message"),
    [
        (["a.jpg"], "a.jpg b.jpg", "images lacks 1, such as b.jpg$"),
        (["b.jpg"], "a.jpg b.jpg", "images lacks 1, such as a.jpg$"),
        ([], "a.jpg b.jpg", "none of them is there, such as a.jpg$"),
        (["a.jpg"], r"images\\a.jpg", r"such as images\\a.jpg; write / in place of \\ in its file names"),
    ],
)
def test_an_image_that_is_not_there_is_named(tree, files, listed, message):
    content = '", "id": 1}, {"file_name": "'.join(listed.split())
    root = tree("labels.json", content=(COCO % content).encode())
    tree(*(f"images/{name}" for name in files))
    with pytest.raises(UserError, match=message):
        find_coco(root)
