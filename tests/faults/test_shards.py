"""Mutated tar shards: refused with one line that names the shard, or every image in them is read or named."""

import io
import os
import random
import tarfile
from collections import Counter

import numpy as np
import pytest
from counts import record
from PIL import Image

from semaim.data.folder import PretrainImages
from semaim.data.shards import printable
from semaim.errors import UserError

ODD_NAMES = [
    "a\nb.jpg", "../x.jpg", "/etc/passwd.jpg", "é.jpg", "\udcff.jpg", "x.tar?0+5=y.jpg", "=.jpg", " .jpg", ".jpg",
    "a" * 300 + ".jpg", "d/" * 60 + "x.jpg", "",
]  # fmt: skip
TYPES = [
    tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE,
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, b"Z", b"\0",
]  # fmt: skip


def photo(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG" if seed % 3 else "PNG")
    return data.getvalue()


PHOTOS = [photo(seed) for seed in range(6)]


def shard(rng, odd=False):
    """The bytes of a shard of six images with a label each, and the offsets of its headers."""
    data = io.BytesIO()
    form = rng.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT if odd else form) as archive:
        for index, content in enumerate(PHOTOS):
            info = tarfile.TarInfo(f"{index:03}.{'jpg' if index % 3 else 'png'}")
            if odd and index == 2:
                info.name = rng.choice(ODD_NAMES)
                content = content[: rng.choice((0, 100, len(content)))]
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
            label = tarfile.TarInfo(f"{index:03}.cls")
            label.size = 1
            archive.addfile(label, io.BytesIO(b"7"))
            if odd and index == 3:
                link = tarfile.TarInfo("link.jpg")
                link.type, link.linkname = rng.choice(TYPES[:5]), "/etc/passwd"
                archive.addfile(link)
    content = data.getvalue()
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return bytearray(content), [member.offset for member in archive]


def sign(data, place):
    """Give a header the right checksum again, as one who writes it would."""
    data[place + 148 : place + 156] = b" " * 8
    data[place + 148 : place + 156] = b"%06o\0 " % sum(data[place : place + 512])


def mutated(rng):
    """A shard and the name of what was done to it."""
    kind = rng.choice(["bytes", "header", "field", "size", "type", "name", "truncated", "inserted", "zeroed", "odd"])
    data, headers = shard(rng, kind == "odd")
    place = rng.choice(headers)
    if kind == "bytes":
        for _ in range(rng.choice((1, 20))):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == "header":
        data[place + rng.randrange(512)] = rng.randrange(256)
    elif kind == "field":
        data[place + rng.randrange(100, 512)] = rng.randrange(256)
        sign(data, place)
    elif kind == "size":
        sizes = [b"77777777777", b"00000000000", b"-0000000005", b"99999999999", b"           ", b"\x80" + b"\xff" * 11]
        size = rng.choice([*sizes, b"\xff" * 12, b"%011o" % rng.randrange(5000)])
        data[place + 124 : place + 124 + len(size)] = size
        sign(data, place)
    elif kind == "type":
        data[place + 156 : place + 157] = rng.choice(TYPES)
        sign(data, place)
    elif kind == "name":
        data[place : place + 100] = rng.randbytes(96) + b".jpg"
        sign(data, place)
    elif kind == "truncated":
        del data[rng.randrange(len(data)) :]
    elif kind == "inserted":
        data[place:place] = rng.randbytes(rng.choice((1, 512, 700)))
    elif kind == "zeroed":
        data[place : place + 512] = bytes(512)
    return bytes(data), kind


def attack(folder, count):
    """Counts of outcomes by kind, and what crashed."""
    outcomes, kinds, crashes = Counter(), Counter(), []
    path = folder / "data/0.tar"
    path.parent.mkdir()
    for seed in range(count):
        data, kind = mutated(random.Random(seed))
        path.write_bytes(data)
        outcome = "trained on"
        try:
            images = PretrainImages(str(path.parent), img_size=16, patch_size=8)
            for index in range(len(images)):
                try:
                    images[0, index]
                except UserError as error:
                    outcome = "an image named"
                    if printable(os.fsdecode(images.paths[index])) not in str(error) or "\n" in str(error):
                        crashes.append((seed, kind, str(error)[:300]))
        except UserError as error:
            outcome = "refused"
            if str(path.parent) not in str(error) or "\n" in str(error):
                crashes.append((seed, kind, str(error)[:300]))
        except Exception as error:
            outcome = "crashed"
            crashes.append((seed, kind, f"{type(error).__name__}: {error}"[:300]))
        if outcome == "trained on" and kind in ("truncated", "inserted", "zeroed") and len(images) < 5:
            crashes.append((seed, kind, f"only {len(images)} of 6 images, without a word"))
        outcomes[outcome] += 1
        kinds[f"{kind}: {outcome}"] += 1
    return outcomes, kinds, crashes


def test_some_mutated_shards(tmp_path):
    outcomes, _, crashes = attack(tmp_path, 40)
    assert not crashes, crashes
    assert min(outcomes["refused"], outcomes["trained on"]) > 5, outcomes


@pytest.mark.faults
def test_three_hundred_mutated_shards(tmp_path):
    outcomes, kinds, crashes = attack(tmp_path, 300)
    record("shards", shards=300, outcomes=outcomes, kinds=dict(sorted(kinds.items())), crashes=crashes)
    assert not crashes, crashes
