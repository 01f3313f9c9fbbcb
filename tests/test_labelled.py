"""Labelled folders: what is found, how images are made, and that a seed repeats them."""

import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data import create_transform as timm_transform

from semaim.data.labelled import LabelledImages, check_classes, find_labelled
from semaim.data.seeding import seeded
from semaim.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Two classes; the image i of a class is i + 1 pixels brighter than black."""
    for split, count in (("train", 3), ("val", 2)):
        for name in ("b", "a"):
            (tmp_path / split / name / "deep").mkdir(parents=True)
            for index in range(count):
                noise = np.random.default_rng(index).integers(0, 255, (40, 60, 3), dtype=np.uint8)
                Image.fromarray(noise).save(tmp_path / split / name / "deep" / f"{index}.png")
    return tmp_path


def test_classes_are_numbered_in_sorted_order(folder):
    paths, labels, classes = find_labelled(folder, "train")
    assert classes == ["a", "b"] and labels == [0, 0, 0, 1, 1, 1]
    assert [path.split("/")[-3] for path in paths] == ["a"] * 3 + ["b"] * 3


def test_how_images_are_made_names_the_seed_if_they_are_random(folder):
    for augment, same in (("none", True), ("random_crop", False)):
        one, two = (LabelledImages(folder, 32, "train", augment, seed=seed).preparation() for seed in (0, 1))
        assert (one == two) is same


@pytest.mark.parametrize("root", ["{0}", "./{0}", "{0}/.//", "../{1}/{0}", "."])
def test_names_are_relative_to_the_folder_however_it_is_spelt(folder, monkeypatch, root):
    expected = LabelledImages(folder, split="val").names()
    monkeypatch.chdir(folder if root == "." else folder.parent)
    images = LabelledImages(root.format(folder.name, folder.parent.name), split="val")
    assert images.names() == expected and all(name.startswith("val/") for name in expected)


def test_every_split_needs_every_class(folder):
    with pytest.raises(UserError, match="val lacks the class folder c: both splits need the same classes"):
        check_classes(["a", "b", "c"], ["a", "b"], folder)
    with pytest.raises(UserError, match="train lacks the class folders c, d:"):
        check_classes(["a"], ["a", "c", "d"], folder)
    check_classes(["a", "b"], ["a", "b"], folder)
    with pytest.raises(UserError, match="no such folder: .*labelled data is"):
        find_labelled(folder / "nowhere", "val")
    shutil.rmtree(folder / "val/a")
    (folder / "val/a").mkdir()
    with pytest.raises(UserError, match="no images in .*val/a"):
        find_labelled(folder, "val")
    shutil.rmtree(folder / "val")
    (folder / "val").mkdir()
    with pytest.raises(UserError, match="no class folders in .*val"):
        find_labelled(folder, "val")


def test_few_labels_are_the_first_of_each_class_by_name(folder):
    for name in ("10.png", "9.png"):  # as text, 10 comes before 2
        shutil.copy(folder / "train/b/deep/0.png", folder / "train/b/deep" / name)
    for count, second in ((1, ["0"]), (2, ["0", "1"]), (3, ["0", "1", "10"])):
        few = LabelledImages(folder, 32, "train", images_per_class=count)
        names = [path.decode().removeprefix(f"{folder}/train/") for path in few.paths]
        assert names == [f"a/deep/{i}.png" for i in range(count)] + [f"b/deep/{name}.png" for name in second]
        assert few.labels.tolist() == [0] * count + [1] * count and few.classes == ["a", "b"] and len(few) == 2 * count
        assert [few[index]["label"] for index in range(len(few))] == few.labels.tolist()
        val, whole = (LabelledImages(folder, 32, "val", images_per_class=n) for n in (count, None))
        assert len(val) == 4 and val.paths.tolist() == whole.paths.tolist(), "validation is on all"
    assert len(LabelledImages(folder, 32, "train")) == 8


@pytest.mark.parametrize("count", [0, -1, 1.5, "2", True, [1]])
def test_few_labels_are_a_whole_number(folder, count):
    with pytest.raises(UserError, match="images_per_class .*: give 1 or more, or None for all$"):
        LabelledImages(folder, 32, "train", images_per_class=count)


def test_more_labels_than_a_class_has_are_refused(folder):
    shutil.copy(folder / "train/a/deep/0.png", folder / "train/a/deep/3.png")
    with pytest.raises(UserError, match="images_per_class 4: class b has 3 training images$"):
        LabelledImages(folder, 32, "train", images_per_class=4)


def test_evaluation_images_are_timms_and_never_random(folder):
    data = LabelledImages(folder, 32, "val", crop_pct=0.8)
    theirs = timm_transform(
        32, crop_pct=0.8, interpolation="bicubic", mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD
    )
    for index in range(len(data)):
        item = data[index]
        image = Image.open(data.paths[index].decode())
        assert item["label"] == index // 2 and item["index"] == index and item["image"].shape == (3, 32, 32)
        torch.testing.assert_close(item["image"], theirs(image), atol=0.02, rtol=0)
        assert torch.equal(item["image"], data[index]["image"])


@pytest.mark.parametrize("augment", ["randaugment", "resized_crop", "random_crop"])
def test_a_seed_an_epoch_and_an_index_repeat_a_training_image(folder, augment):
    def make(seed=3):
        return LabelledImages(folder, 32, "train", augment=augment, random_erase=1.0, seed=seed)

    first = make()[(2, 1)]["image"]
    random.random(), np.random.rand(), torch.rand(1)
    assert torch.equal(make()[(2, 1)]["image"], first)
    assert not torch.equal(make()[(3, 1)]["image"], first) and not torch.equal(make(4)[(2, 1)]["image"], first)
    assert first.shape == (3, 32, 32) and first.isfinite().all()


def test_augmentations_do_what_they_are_called(folder):
    image = Image.open(find_labelled(folder, "train")[0][0])
    flat = LabelledImages(folder, 32, "train", augment="random_crop")
    # Resized to 32 x 48 (short side 32) and cut: every crop is a part of that, flipped or not.
    whole = np.asarray(image.resize((48, 32), Image.BICUBIC), np.float32) / 255
    whole = (whole - np.float32(IMAGENET_DEFAULT_MEAN)) / np.float32(IMAGENET_DEFAULT_STD)
    for epoch in range(5):
        crop = flat[(epoch, 0)]["image"].permute(1, 2, 0).numpy()
        errors = [abs(whole[:, x : x + 32] - c).max() for x in range(17) for c in (crop, crop[:, ::-1])]
        assert min(errors) < 0.1
    erased = LabelledImages(folder, 32, "train", augment="randaugment", rand_augment="rand-m0-n0", random_erase=1.0)
    kept = LabelledImages(folder, 32, "train", augment="randaugment", rand_augment="rand-m0-n0", random_erase=0.0)
    shares = [(erased[(e, 0)]["image"] != kept[(e, 0)]["image"]).any(dim=0).float().mean().item() for e in range(10)]
    assert all(0.01 < share < 0.5 for share in shares), shares


def test_unknown_augment(folder):
    with pytest.raises(UserError, match="unknown dataset.augment 'mixup': choose from randaugment"):
        LabelledImages(folder, 32, "train", augment="mixup")


def test_seeded_leaves_the_generators_as_they_were():
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    expected = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    with seeded(1, 2):
        inside = torch.rand(1).item(), np.random.rand(), random.random()
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected
    with seeded(1, 2):
        assert (torch.rand(1).item(), np.random.rand(), random.random()) == inside
