"""Broken class folders: refused in a line, an image named when it is read, or read with their folders' labels."""

import io
import os
import random
import shutil
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT
from counts import record
from PIL import Image

from semaim.engine.config import load_config, set_data_root
from semaim.engine.images import build_datasets
from semaim.errors import UserError
from semaim.registry import task_of

PROBE = "semaim/configs/linear/vit_tiny_scenes.py"
NAMES = ("cat", "dog", "emu")
#: Modes of an image and formats that hold it.
FORMS = [("L", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("LA", "PNG"), ("1", "PNG"), ("I;16", "PNG"), ("RGB", "WEBP"),
         ("CMYK", "JPEG"), ("RGB", "BMP"), ("P", "GIF"), ("RGB", "TIFF"), ("F", "TIFF"), ("RGB", "PPM")]  # fmt: skip


def written(root: Path) -> None:
    """Three classes of four training and two validation images. A class has a colour."""
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(NAMES):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.full((24, 24, 3), 40 + 80 * label, np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")


def encoded(mode: str, form: str) -> bytes:
    image = Image.fromarray(np.full((24, 24), 7, np.uint16)) if mode == "I;16" else Image.new(mode, (24, 24))
    data = io.BytesIO()
    image.save(data, form)
    return data.getvalue()


def huge() -> bytes:
    """A PNG file of 60,000 pixels square, without its pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))


def broken(root: Path, rng: random.Random) -> str:
    """Do something to one of the folders; returns its name."""
    folder = root / rng.choice(["train", "val"]) / rng.choice(NAMES)
    file = rng.choice(sorted(folder.iterdir()))
    kind = rng.choice(["byte", "truncated", "empty", "text", "mode", "huge", "pixel", "gone", "no images", "one split",
                       "loose", "nested", "hidden", "link", "dangling", "loop", "folder", "pipe", "name", "other files",
                       "renamed", "shard"])  # fmt: skip
    data = bytearray(file.read_bytes())
    if kind == "byte":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
    elif kind == "truncated":
        file.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "mode":
        file.write_bytes(encoded(*rng.choice(FORMS)))
    elif kind in ("empty", "text", "huge"):
        file.write_bytes({"empty": b"", "text": b"<html>404</html>", "huge": huge()}[kind])
    elif kind == "pixel":
        Image.new("RGB", (rng.choice([1, 3000]), 1)).save(file)
    elif kind == "gone":
        shutil.rmtree(folder)
    elif kind == "no images":
        for path in folder.iterdir():
            path.unlink()
    elif kind == "one split":
        other = folder.parent / rng.choice(["fox", "Cat", "cat "])
        other.mkdir()
        shutil.copy(file, other / "0.png")
    elif kind == "loose":
        shutil.copy(file, folder.parent / "0.png")
    elif kind == "nested":
        (folder / "more").mkdir()
        shutil.move(file, folder / "more" / file.name)
    elif kind == "hidden":
        (folder / f"._{file.name}").write_bytes(b"a Mac's")
        (folder / ".DS_Store").write_bytes(b"a Mac's")
    elif kind == "link":
        file.rename(root / "elsewhere.png")
        file.symlink_to(root / "elsewhere.png")
    elif kind == "dangling":
        (folder / "x.png").symlink_to(root / "nowhere.png")
    elif kind == "loop":
        (folder / "loop").symlink_to(rng.choice([folder, folder.parent, root, folder / "loop"]))
    elif kind == "folder":
        (folder / "x.png").mkdir()
    elif kind == "pipe":
        os.mkfifo(folder / "x.png")
    elif kind == "name":
        name = rng.choice([b"\xff\xfe.png", b"a b\n.png", b"x" * 200 + b".PNG"])
        file.rename(folder / os.fsdecode(name))
    elif kind == "other files":
        (folder / rng.choice(["list.txt", "notes.pdf", "Thumbs.db", "x.png.tmp", "png"])).write_bytes(b"text")
    elif kind == "renamed":
        file.rename(file.with_suffix(rng.choice([".jpg", ".JPEG", ".tiff"])))
    elif kind == "shard":
        (folder / "x.tar").write_bytes(b"no shard")
    return kind


def plainly(root: Path, split: str) -> Counter:
    """(label, file name) of each image of a split, without the suite."""
    names = sorted(entry.name for entry in (root / split).iterdir() if entry.is_dir())
    endings = (".png", ".jpg", ".jpeg", ".tiff")
    return Counter(
        (label, path.name)
        for label, name in enumerate(names)
        for path in (root / split / name).rglob("*")
        if path.name.lower().endswith(endings) and not path.is_dir() and not path.name.startswith(".")
    )


def attack(place: Path, count: int):
    """Counts of outcomes by kind, and what crashed."""
    outcomes, kinds, crashes = Counter(), Counter(), []
    cfg = load_config(ROOT / PROBE, {"model.network.num_classes": None})
    task_of(cfg).enter(cfg)
    for seed in range(count):
        root, rng = place / str(seed), random.Random(seed)
        written(root)
        kind = broken(root, rng)
        trial = load_config(ROOT / PROBE, {"model.network.num_classes": None})
        set_data_root(trial, str(root))
        outcome = "refused"
        try:
            splits = build_datasets(trial)
            outcome = "an image named"
            for name, images in zip(("train", "val"), splits, strict=True):
                assert images.classes == sorted(images.classes) and trial.model.network.num_classes == 3
                read = Counter((item["label"], Path(images.names()[item["index"]]).name) for item in images)
                assert read == plainly(root, name), (read, plainly(root, name))
            outcome = "trained on"
        except UserError as error:
            if "\n" in str(error) or str(root) not in str(error) and outcome == "an image named":
                crashes.append((seed, kind, str(error)[:300]))
        except Exception as error:
            outcome = "crashed"
            crashes.append((seed, kind, f"{type(error).__name__}: {error}"[:300]))
        outcomes[outcome] += 1
        kinds[f"{kind}: {outcome}"] += 1
        shutil.rmtree(root)
    return outcomes, kinds, crashes


def test_some_broken_folders(tmp_path):
    outcomes, _, crashes = attack(tmp_path, 60)
    assert not crashes, crashes
    assert min(outcomes["refused"], outcomes["trained on"], outcomes["an image named"]) > 2, outcomes


@pytest.mark.faults
def test_four_hundred_broken_folders(tmp_path):
    outcomes, kinds, crashes = attack(tmp_path, 400)
    record("class_folders", folders=400, outcomes=outcomes, kinds=dict(sorted(kinds.items())), crashes=crashes)
    assert not crashes, crashes
