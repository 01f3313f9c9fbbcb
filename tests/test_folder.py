"""Finding and reading images, repeatable crops, batches that resume and split."""

import io
import os
import shutil
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from semaim.data.decoding import load_image
from semaim.data.folder import PretrainImages, ResumableBatches, find_images
from semaim.data.labelled import find_labelled
from semaim.errors import UserError


def picture(path, size=(20, 16), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def test_class_folders_flat_folders_and_lists_give_the_same_images(tmp_path):
    for name in ("cat/b.png", "cat/a.JPG", "dog/c.png"):
        picture(tmp_path / "tree/train" / name)
        picture(tmp_path / "flat" / name.split("/")[1])
    picture(tmp_path / "tree/val/cat/other.png")
    (tmp_path / "tree/train/notes.txt").write_text("no image")
    (tmp_path / "list.txt").write_text("tree/train/cat/a.JPG 0\ntree/train/cat/b.png 0\n\ntree/train/dog/c.png 12\n")
    tree = find_images(tmp_path / "tree")
    assert [path.removeprefix(f"{tmp_path}/tree/train/") for path in tree] == ["cat/a.JPG", "cat/b.png", "dog/c.png"]
    assert find_images(tmp_path / "list.txt") == tree
    assert [path.removeprefix(f"{tmp_path}/flat/") for path in find_images(tmp_path / "flat")] == [
        "a.JPG",
        "b.png",
        "c.png",
    ]


def test_a_class_called_train_is_no_split(tmp_path):
    """The built-in scenes have such a class: their training images, and those of one class, are all read."""
    names = ["bag/a.png", "train/b.png", "train/train/c.png"]
    for split in ("train", "val"):
        for name in names:
            picture(tmp_path / split / name)
    for root in (tmp_path / "train", tmp_path):
        assert find_images(root) == [f"{tmp_path}/train/{name}" for name in names]
    paths, labels, classes = find_labelled(tmp_path, "val")
    assert (len(paths), labels, classes) == (3, [0, 1, 1], ["bag", "train"])


def test_a_list_takes_names_with_spaces(tmp_path):
    picture(tmp_path / "my cat.png")
    (tmp_path / "list.txt").write_text("my cat.png\nmy cat.png 3\n")
    assert find_images(tmp_path / "list.txt") == [str(tmp_path / "my cat.png")] * 2


def test_bad_roots_are_named(tmp_path):
    with pytest.raises(UserError, match="no such folder.*nowhere"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no images in"):
        find_images(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="empty list"):
        find_images(tmp_path / "empty.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(UserError, match="no text file"):
        find_images(tmp_path / "binary.txt")


def test_links_that_lead_back_are_refused_and_others_followed(tmp_path):
    for name in ("data/a", "data/b", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "x.png")
    (tmp_path / "data/a/more").symlink_to(tmp_path / "elsewhere")
    found = [path[len(str(tmp_path)) + 1 :] for path in find_images(tmp_path / "data")]
    assert found == ["data/a/more/x.png", "data/a/x.png", "data/b/x.png"]
    for target in ("data", "data/a", "."):
        (tmp_path / "elsewhere/back").symlink_to(tmp_path / target)
        with pytest.raises(UserError, match="/back is a link to .*, a folder that it is in"):
            find_images(tmp_path / "data")
        (tmp_path / "elsewhere/back").unlink()
    # Two links, each into the other's folder.
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "data/b")
    (tmp_path / "data/b/back").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="/back is a link to .*, a folder that it is in"):
        find_images(tmp_path / "data")


def test_a_named_pipe_is_no_image_and_nobody_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"cannot read image .*x\.png: broken or no image"):
        load_image(str(tmp_path / "x.png"))


def test_label_maps_are_no_images(tmp_path):
    # Pretraining on a data set's root took its label maps, which are PNG files, for photographs.
    for kind in ("images", "annotations"):
        picture(tmp_path / "ade" / kind / "training/a.png")
    for root in (tmp_path, tmp_path / "ade"):
        with pytest.raises(UserError, match="ade/annotations holds label maps, not images: name .*ade/images$"):
            find_images(root)
    assert len(find_images(tmp_path / "ade/images")) == 1
    picture(tmp_path / "annotations/flat/b.png")  # above the root, the name says nothing
    assert len(find_images(tmp_path / "annotations/flat")) == 1


@pytest.mark.parametrize("broken", ["truncated.jpg", "text.png", "missing.png"])
def test_broken_images_are_named(tmp_path, broken):
    file = tmp_path / broken
    if broken == "truncated.jpg":
        picture(file, (64, 64))
        file.write_bytes(file.read_bytes()[:600])
    elif broken == "text.png":
        file.write_text("hello")
    with pytest.raises(UserError, match=f"cannot read image .*{broken}"):
        load_image(str(file))


def test_images_smaller_than_a_patch_are_named(tmp_path):
    picture(tmp_path / "thin.png", (30, 7))
    data = PretrainImages(str(tmp_path), img_size=16, patch_size=8)
    with pytest.raises(UserError, match="thin.png of 30 x 7 pixels is smaller than a patch of 8"):
        data[0, 0]


def test_a_sample_depends_on_seed_epoch_and_index_alone(tmp_path):
    for index in range(3):
        picture(tmp_path / f"{index}.png", (40, 30), seed=index)
    data = PretrainImages(str(tmp_path), img_size=16, patch_size=8, seed=5)
    first = data[1, 2]
    assert first["image"].shape == (3, 16, 16) and first["image"].dtype == torch.uint8
    assert first["draw"].shape == (4,) and 0 <= first["draw"].min() and first["draw"].max() < 1
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = data[1, 2]
    assert torch.equal(before, torch.get_rng_state()), "the global generator was touched"
    assert torch.equal(first["image"], again["image"]) and torch.equal(first["draw"], again["draw"])
    for other in (data[0, 2], data[1, 1], PretrainImages(str(tmp_path), 16, 8, seed=6)[1, 2]):
        assert not torch.equal(first["draw"], other["draw"])


def test_workers_change_nothing(scenes):
    data = PretrainImages(str(scenes), img_size=16, patch_size=8)
    batches = [
        list(torch.utils.data.DataLoader(data, batch_sampler=ResumableBatches(len(data), 8), num_workers=workers))
        for workers in (0, 2)
    ]
    for alone, helped in zip(*batches, strict=True):
        assert torch.equal(alone["image"], helped["image"]) and torch.equal(alone["draw"], helped["draw"])


def test_a_broken_image_in_a_worker_keeps_its_line(tmp_path, scenes):
    shutil.copytree(scenes, tmp_path / "data")
    victim = next((tmp_path / "data/train").rglob("*.jpg"))
    victim.write_bytes(b"not an image")
    data = PretrainImages(str(tmp_path / "data"), img_size=16, patch_size=8)
    loader = torch.utils.data.DataLoader(data, batch_sampler=ResumableBatches(len(data), 8), num_workers=1)
    with pytest.raises(UserError, match=victim.name):
        list(loader)


@given(
    length=st.integers(1, 200),
    images=st.integers(1, 6),
    accumulation=st.integers(1, 3),
    processes=st.integers(1, 4),
    epoch=st.integers(0, 5),
)
def test_total_batches_are_the_same_for_every_split(length, images, accumulation, processes, epoch):
    total = images * accumulation * processes
    if length < total:
        with pytest.raises(UserError, match=f"{length} images are fewer than one batch of {total}"):
            ResumableBatches(length, images, accumulation, processes)
        return

    def steps(images, accumulation, processes):
        ranks = [ResumableBatches(length, images, accumulation, processes, rank, seed=3) for rank in range(processes)]
        for sampler in ranks:
            sampler.epoch = epoch
        batches = [list(sampler) for sampler in ranks]
        assert all(len(batch) == images for rank in batches for batch in rank)
        assert all(len(rank) == len(ranks[0]) for rank in batches)
        return [
            sorted(key for rank in batches for batch in rank[step : step + accumulation] for key in batch)
            for step in range(0, len(ranks[0]), accumulation)
        ]

    split = steps(images, accumulation, processes)
    assert split == steps(total, 1, 1)
    keys = [key for step in split for key in step]
    assert len(set(keys)) == len(keys) == length // total * total
    assert all(key[0] == epoch and 0 <= key[1] < length for key in keys)


def test_epochs_differ_and_a_start_skips_what_was_seen():
    sampler = ResumableBatches(50, 4)
    whole = list(sampler)
    sampler.start = 5
    assert list(sampler) == whole[5:] and len(sampler) == len(whole) == 12
    sampler.start, sampler.epoch = 0, 1
    assert [i for batch in sampler for _, i in batch] != [i for batch in whole for _, i in batch]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_give_the_samples_of_the_folder(tmp_path, form):
    names = [f"{index:03}.{'png' if index % 3 else 'jpg'}" for index in range(9)]
    for index, name in enumerate(names):
        picture(tmp_path / "folder" / name, (40, 30), seed=index)
    (tmp_path / "shards").mkdir()
    deep = "a" * (
        60 if form == tarfile.USTAR_FORMAT else 150
    )  # the others write longer names into headers of their own
    for number, part in enumerate((names[:4], names[4:])):
        with tarfile.open(tmp_path / f"shards/{number:06}.tar", "w", format=form) as shard:
            for name in part:
                shard.add(tmp_path / "folder" / name, f"{deep}/{name}")
                label = tarfile.TarInfo(name[:3] + ".cls")
                label.size = 1
                shard.addfile(label, io.BytesIO(b"7"))
    folder = PretrainImages(str(tmp_path / "folder"), img_size=16, patch_size=8)
    shards = PretrainImages(str(tmp_path / "shards"), img_size=16, patch_size=8)
    assert len(folder) == len(shards) == 9
    for index in range(9):
        one, other = folder[2, index], shards[2, index]
        assert torch.equal(one["image"], other["image"]) and torch.equal(one["draw"], other["draw"])
    assert torch.equal(folder.preview(3), shards.preview(3))
    assert len(find_images(tmp_path / "shards/000001.tar")) == 5


def test_bad_shards_are_named(tmp_path):
    picture(tmp_path / "a.png", (64, 64))
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data/0.tar", "w") as shard:
        shard.add(tmp_path / "a.png", "a.png")
        torn = tarfile.TarInfo("torn.jpg")
        torn.size = 4
        shard.addfile(torn, io.BytesIO(b"none"))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        shard.addfile(link)
    whole = (tmp_path / "data/0.tar").read_bytes()
    data = PretrainImages(str(tmp_path / "data"), img_size=16, patch_size=8)
    assert len(data) == 2 and data[0, 0]["image"].shape == (3, 16, 16)
    with pytest.raises(UserError, match=r"cannot read image .*0\.tar.*torn\.jpg"):
        data[0, 1]
    (tmp_path / "data/0.tar").write_bytes(whole[:1000])
    with pytest.raises(UserError, match=r"0\.tar (ends within a\.png|is no tar file)"):
        find_images(tmp_path / "data")
    (tmp_path / "data/0.tar").write_bytes(b"x" * 2000)
    with pytest.raises(UserError, match=r"0\.tar is no tar file"):
        find_images(tmp_path / "data")
    (tmp_path / "data/0.tar").rename(tmp_path / "data/0.tar.gz")
    with pytest.raises(UserError, match=r"compressed shards cannot be read at random"):
        find_images(tmp_path / "data")
