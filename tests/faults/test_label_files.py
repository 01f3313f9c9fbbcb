"""Mutated label maps: each is refused with one line that names the file, or read with the values that were counted."""

import gc
import io
import random
import struct
import zlib
from collections import Counter

import pytest
from counts import record

pytest.importorskip("mmseg", reason="mmseg is not installed: runs after tools/setup.sh --extras all")

import numpy as np  # noqa: E402
from commands import ROOT, check_data  # noqa: E402
from PIL import Image  # noqa: E402

from semaim.data.label_maps import count_values  # noqa: E402
from semaim.data.scenes import write_scenes  # noqa: E402
from semaim.engine import dense  # noqa: E402
from semaim.engine.config import load_config, set_data_root  # noqa: E402
from semaim.errors import UserError  # noqa: E402

SCENES = "mmseg_configs/semaim_upernet_scenes.py"
SIDE = 32
MODES = ["1", "L", "P", "LA", "RGB", "RGBA", "I;16", "I", "F", "CMYK"]


def encoded(image, form="PNG", **options):
    data = io.BytesIO()
    image.save(data, form, **options)
    return bytearray(data.getvalue())


def chunks(data):
    """(start, length of the content, kind) of each chunk of a PNG file."""
    place, found = 8, []
    while place + 12 <= len(data):
        length = struct.unpack(">I", data[place : place + 4])[0]
        found.append((place, length, bytes(data[place + 4 : place + 8])))
        place += 12 + length
    return found


def signed(data, place, length):
    """A chunk's checksum made right again."""
    data[place + 8 + length : place + 12 + length] = struct.pack(">I", zlib.crc32(data[place + 4 : place + 8 + length]))


def mutated(values, data, rng):
    """The bytes of a label map and the name of what was done to it."""
    data = bytearray(data)
    kind = rng.choice(
        ["byte", "bytes", "signed", "header", "truncated", "mode", "size", "values", "format", "empty", "chunks"]
    )
    if kind in ("byte", "bytes"):
        for _ in range(1 if kind == "byte" else 20):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == "signed":
        place, length, _ = next(chunk for chunk in chunks(data) if chunk[2] == b"IDAT")
        data[place + 8 + rng.randrange(length)] ^= 1 << rng.randrange(8)
        signed(data, place, length)
    elif kind == "header":
        place, length, _ = chunks(data)[0]
        data[place + 8 + rng.randrange(length)] = rng.choice([0, 1, 2, 3, 4, 8, 16, 128, 255])
        signed(data, place, length)
    elif kind == "truncated":
        del data[rng.randrange(len(data)) :]
    elif kind == "mode":
        mode = rng.choice(MODES)
        image = Image.fromarray(values)
        image = Image.fromarray(values.astype(np.uint16)) if mode == "I;16" else image.convert(mode)
        data = encoded(image, "TIFF" if mode in ("F", "CMYK", "I") else "PNG")
    elif kind == "size":
        sides = rng.choice([(SIDE, SIDE - 1), (1, 1), (SIDE * 2, SIDE * 2), (SIDE + 1, SIDE), (4000, 4000)])
        data = encoded(Image.fromarray(values).resize(sides, Image.Resampling.NEAREST))
    elif kind == "values":
        other = values.astype(rng.choice([np.uint8, np.uint16, np.int32]))
        other[rng.randrange(SIDE), rng.randrange(SIDE)] = rng.choice([0, 20, 21, 22, 100, 254, 255])
        if other.dtype != np.uint8:
            other[0, 0] = rng.choice([1, 256, 257, 65535])
        if other.dtype == np.int32:
            other[0, 1] = rng.choice([-1, 2**31 - 1, 1])
        data = encoded(Image.fromarray(other), "TIFF" if other.dtype == np.int32 else "PNG")
    elif kind == "format":
        image = Image.fromarray(values)
        form = rng.choice(["BMP", "GIF", "TIFF", "JPEG", "PPM", "TGA"])
        data = encoded(image, form)
    elif kind == "empty":
        data = bytearray(rng.choice([b"", b"\0" * 100, b"text", b"\x89PNG\r\n\x1a\n"]))
    elif kind == "chunks":
        place, length, _ = rng.choice(chunks(data))
        if rng.random() < 0.5:
            del data[place : place + 12 + length]
        else:
            data[place:place] = data[place : place + 12 + length]
    return bytes(data), kind


def attack(folder, count):
    """Counts of outcomes by kind, and what crashed."""
    write_scenes(folder, 4, SIDE, seed=0, val_fraction=0.25)
    cfg = load_config(ROOT / SCENES)
    set_data_root(cfg, str(folder / "ade"))
    dense.enter(cfg)
    gc.freeze()  # mmengine collects garbage for every data set, slow with all that was imported
    label = sorted((folder / "ade/annotations/training").iterdir())[1]
    data, values = label.read_bytes(), np.asarray(Image.open(label))
    outcomes, kinds, crashes = Counter(), Counter(), []
    for seed in range(count):
        content, kind = mutated(values, data, random.Random(seed))
        label.write_bytes(content)
        try:
            train, _ = check_data(cfg, ("train_dataset", "val_dataset"))
            images = dense.SeededImages(train, 0)
            for index in range(len(images)):
                images[0, index]
            # What mmseg reads of the file has the values that the check has counted.
            info = next(i for i in map(train.get_data_info, range(len(train))) if i["seg_map_path"] == str(label))
            read = train.pipeline.transforms[1](train.pipeline.transforms[0](dict(info)))["gt_seg_map"]
            counted = count_values([(info["img_path"], str(label))])[str(label)]
            trained = {255 if value in (0, 255) else value - 1: 0 for value in counted}
            assert set(np.unique(read).tolist()) == set(trained), (counted, np.unique(read))
            outcome = "trained on"
        except UserError as error:
            outcome = "refused"
            if "\n" in str(error) or label.name not in str(error) or "cannot prepare" in str(error):
                crashes.append((seed, kind, str(error)[:300]))
        except Exception as error:
            outcome = "crashed"
            crashes.append((seed, kind, f"{type(error).__name__}: {error}"[:300]))
        outcomes[outcome] += 1
        kinds[f"{kind}: {outcome}"] += 1
    return outcomes, kinds, crashes


def test_some_mutated_maps(tmp_path):
    outcomes, _, crashes = attack(tmp_path, 30)
    assert not crashes, crashes
    assert min(outcomes["refused"], outcomes["trained on"]) > 2, outcomes


@pytest.mark.faults
def test_five_hundred_mutated_maps(tmp_path):
    outcomes, kinds, crashes = attack(tmp_path, 500)
    record("label_maps", maps=500, outcomes=outcomes, kinds=dict(sorted(kinds.items())), crashes=crashes)
    assert not crashes, crashes
