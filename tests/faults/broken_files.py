"""Checkpoints of five formats, and mutations of them by seed."""

import argparse
import io
import json
import pickle
import pickletools
import random
import struct
import zipfile

import torch
from dialect_files import SIZES, prefixed, random_states
from safetensors.torch import save

FORMATS = ("ours.pth", "foreign.pth", "old.pth", "file.safetensors", "file.pkl")
CHECKED = FORMATS[:2]  #: formats with checksums, those of the zip


def files() -> dict[str, bytes]:
    """A checkpoint in each format."""
    state = random_states()["encoder"]
    config = {
        "model": {"type": "Pretraining", "network": dict(SIZES)},
        "dataset": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }
    ours = {"format": "semaim", "model": state, "epoch": 3, "step": 7, "config": config, "history": [(1, 0.5)] * 20}
    args = argparse.Namespace(lr=0.1, name="x")
    foreign = {"model": state, "epoch": 3, "args": args, "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}}
    arrays = {name: tensor.numpy() for name, tensor in prefixed("backbone.net.", state).items()}
    written = {}
    for name, content, zipped in (
        ("ours.pth", ours, True),
        ("foreign.pth", foreign, True),
        ("old.pth", foreign, False),
    ):
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
        written[name] = buffer.getvalue()
    written["file.safetensors"] = save(state, {"a": "b"})
    return written | {"file.pkl": pickle.dumps({"model": arrays, "__author__": "x"}, protocol=2)}


def mutated(name: str, data: bytes, seed: int) -> tuple[bytes, str, bool]:
    """A mutated file, the kind of mutation, and whether its checksums were made to fit it."""
    draw = random.Random(f"{name} {seed}")
    kinds = [flips, flips, truncated, spliced, zeroed, *([headed] * 2 if "pkl" not in name else [])]
    kinds += [] if "safetensors" in name else [swapped, swapped, swapped]
    kind = draw.choice(kinds)
    if kind in (headed, swapped) and name in CHECKED and (kind is swapped or draw.random() < 0.3):
        return rezipped(data, draw), "swapped in the zip", True
    return kind(data, draw), kind.__name__, False


def place_in(data: bytes, draw: random.Random) -> int:
    """A place in the file: half of them in its first or last kilobytes, where the structure is."""
    part = min(len(data), 4096)
    return draw.choice(
        (draw.randrange(len(data)), draw.randrange(len(data)), draw.randrange(part), -1 - draw.randrange(part))
    )


def flips(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 4, 30))):
        changed[place_in(data, draw)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def truncated(data: bytes, draw: random.Random) -> bytes:
    return data[: place_in(data, draw)]


def spliced(data: bytes, draw: random.Random) -> bytes:
    """Take out a range, or put in one from elsewhere."""
    start, end, other = sorted(
        (place_in(data, draw) % len(data), place_in(data, draw) % len(data), draw.randrange(len(data)))
    )
    piece = data[start : start + draw.choice((1, 8, 100, 5000))]
    return draw.choice(
        (data[:start] + data[end:], data[:end] + piece + data[end:], data[:end] + piece + data[end + len(piece) :])
    )


def zeroed(data: bytes, draw: random.Random) -> bytes:
    start = place_in(data, draw) % len(data)
    end = min(len(data), start + draw.choice((1, 16, 512, 5000)))
    return data[:start] + draw.choice((b"\0", b"\xff")) * (end - start) + data[end:]


def headed(data: bytes, draw: random.Random) -> bytes:
    """Edit the header of a zip, of a safetensors file, or of an old file."""
    changed = bytearray(data)
    if data[:2] == b"PK":
        starts = [place for place in range(len(data) - 4) if data[place : place + 2] == b"PK" and data[place + 2] < 8]
        place = draw.choice(starts) + draw.randrange(4, 50)
        width = draw.choice((1, 2, 4, 8))
        value = draw.choice((0, 1, 8, 2**31, 2**32 - 1, 2**63, draw.randrange(2**64))) % 256**width
        changed[place : place + width] = value.to_bytes(width, "little")
        return bytes(changed)
    if data[8:9] != b"{":
        return flips(data[:2000], draw) + data[2000:]
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    entry = header[draw.choice([name for name in header if name != "__metadata__"])]
    kind, shape, offsets = (
        draw.choice(("F64", "F16", "BF16", "I8", "BOOL", "F8_E5M2", "F4", "U64", "x", 3)),
        draw.choice(([], [-1], [2**62, 4], [0], [1] * 70, entry["shape"][::-1], None)),
        draw.choice(([0, 4], [4, 0], [-4, 4], [0, 2**63], [0], entry["data_offsets"][::-1])),
    )
    more = draw.choice(("", "\x1b[2J", "pos_embed", "blocks.0", "x" * 9999))
    edit = draw.choice(({"dtype": kind}, {"shape": shape}, {"data_offsets": offsets}, more, {}))
    if edit == {}:
        header["__metadata__"] = draw.choice((3, {"a": 1}, {"a": "b" * 9999}, {}))
    elif isinstance(edit, str):
        header[edit] = dict(entry)
    else:
        entry |= edit
    text = json.dumps(header).encode()
    return (
        draw.choice((struct.pack("<Q", len(text)), data[:8], struct.pack("<Q", draw.randrange(2**64))))
        + text
        + data[8 + size :]
    )


def swapped(data: bytes, draw: random.Random) -> bytes:
    """Change opcodes of a pickle, their arguments' bytes, or names in it."""
    try:
        places = [at for _, _, at in pickletools.genops(data)]
    except Exception:  # an old file holds several
        places = list(range(min(len(data), 3000)))
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5))):
        place = draw.choice(places) + draw.choice((0, 0, 0, 1, 2, 5))
        code = draw.choice(pickletools.opcodes).code.encode("latin1")
        way = draw.randrange(5)
        if way == 0:
            changed[place : place + 1] = code
        elif way == 1:
            changed[place:place] = code * draw.choice((1, 2, 300))
        elif way == 2:
            changed[place : place + draw.choice((1, 2, 6))] = b""
        elif way == 3:
            changed[place:place] = draw.choice(INSERTED)
        else:
            changed = changed.replace(*draw.choice(NAMES), draw.choice((1, -1)))
    return bytes(changed)


#: Pieces of pickles that are pushed somewhere.
INSERTED = (
    b"ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85R",
    b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R",
    b")\x81",
    b"}b",
    b"r\xff\xff\xff\x7f",
    b"X\xff\xff\xff\x7f",
    b"\x8b\xff\xff\xff\x7f",
    b")" + b"\x85" * 3000,
    b"]" * 3000,
    b"h\x00h\x00\x86",
    b"ccollections\nOrderedDict\n(]NtR",
    b"c_codecs\nencode\nX\x01\0\0\0aX\x03\0\0\0rot\x86R",
    b"cnumpy\ndtype\nX\x02\0\0\0O8\x85R",
    b"cnumpy\nndarray\n)\x81",
    b"ctorch._utils\n_rebuild_qtensor\n)R",
    b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n)R",
    b"ccollections\nCounter\n)R",
    b"cargparse\nNamespace\n)\x81",
    b"cbuiltins\nset\n(](NNet\x85R",
    b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f",
)
#: Parts of pickles and what stands in their place.
NAMES = (
    (b"FloatStorage", b"DoubleStorage"),
    (b"FloatStorage", b"HalfStorage"),
    (b"FloatStorage", b"QInt8Storage"),
    (b"_rebuild_tensor_v2", b"_rebuild_tensor_v3"),
    (b"_rebuild_tensor_v2", b"_rebuild_parameter"),
    (b"_rebuild_tensor_v2", b"_rebuild_sparse_tensor"),
    (b"storage", b"xtorage"),
    (b"collections\nOrderedDict", b"builtins\nset"),
    (b"_reconstruct", b"scalar"),
    (b"numpy", b"numpy.core"),
    (b"f4", b"O8"),
    (b"f4", b"U9"),
    (b"f4", b"f2"),
    (b"K\x01", b"K\x00"),
    (b"K\x20", b"M\xff\xff"),
    (b"K\x00", b"J\xff\xff\xff\xff"),
    (b"K\x20", b"N"),
    (b"K\x03", b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f"),
    (b"\x86", b"\x85"),
)


def rezipped(data: bytes, draw: random.Random) -> bytes:
    """A zip with a changed pickle, or with members left out, and checksums that fit."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", draw.choice((0, 0, 0, 8))) as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                content = swapped(content, draw)
            elif draw.random() < 0.02:
                content = content[: len(content) // 2]
            if draw.random() < 0.98:
                new.writestr(name, content)
    return buffer.getvalue()
