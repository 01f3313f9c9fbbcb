"""How often damage in photographs is noticed: by the tool that checks a folder, by pretraining, and by Pillow."""

import random
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from commands import tool
from counts import record

from semaim.data.decoding import load_image, load_pixels
from semaim.errors import UserError

SEED, PHOTOS = 20261, 100


def over_the_middle(data, generator, new):
    """Bytes over the middle of the coded image."""
    place = generator.randrange(len(data) // 4, 3 * len(data) // 4)
    return data[:place] + new + data[place + len(new) :]


def flipped(data, generator, count):
    """Bits changed in the second half."""
    data = bytearray(data)
    for _ in range(count):
        data[generator.randrange(len(data) // 2, len(data) - 2)] ^= 1 << generator.randrange(8)
    return bytes(data)


DAMAGE = {
    "none": lambda data, generator: data,
    "2,000 zeros": lambda data, generator: over_the_middle(data, generator, bytes(2000)),
    "100 zeros": lambda data, generator: over_the_middle(data, generator, bytes(100)),
    "100 random bytes": lambda data, generator: over_the_middle(data, generator, generator.randbytes(100)),
    "1 bit": lambda data, generator: flipped(data, generator, 1),
    "10 bits": lambda data, generator: flipped(data, generator, 10),
    "512 bytes missing": lambda data, generator: data[: len(data) // 2] + data[len(data) // 2 + 512 :],
    "second half missing": lambda data, generator: data[: len(data) // 2],
    "the same, with an end marker": lambda data, generator: data[: len(data) // 2] + b"\xff\xd9",
}


@pytest.mark.faults
def test_what_is_damaged_is_counted(shared, tmp_path):
    with tarfile.open(shared / "data" / "coco_mini.tar") as archive:
        members = [member for member in archive if member.name.endswith(".jpg")][:PHOTOS]
        photos = [archive.extractfile(member).read() for member in members]
    counts = {}
    for name, damage in DAMAGE.items():
        generator, folder = random.Random(SEED), tmp_path / name.replace(" ", "_")
        folder.mkdir()
        for place, photo in enumerate(photos):
            (folder / f"{place:03}.jpg").write_bytes(damage(photo, generator))
        said = tool("verify_dataset.py", "images", folder, "--out", tmp_path / "list.txt")
        assert "Traceback" not in said.stderr
        listed = (tmp_path / "list.txt").read_text().split() if (tmp_path / "list.txt").exists() else []
        (tmp_path / "list.txt").unlink(missing_ok=True)
        found = Counter({"verify_dataset.py images": len(listed)})
        for reader, read in (("pretraining", load_pixels), ("Pillow", load_image)):
            found[reader] = sum(refused(read, path) for path in sorted(folder.iterdir()))
        counts[name] = dict(found)
    record("jpegs", photographs=len(photos), seed=SEED, noticed=counts)
    assert not any(counts["none"].values())
    assert set(counts["second half missing"].values()) == {len(photos)}


def refused(read, path: Path) -> bool:
    """Whether a reader refuses a file."""
    try:
        read(str(path))
    except UserError:
        return True
    return False
