"""Checkpoints by strangers: forged, damaged and oversized ones are refused in one line, before memory is taken."""

import io
import json
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from commands import one_line, tool
from dialect_files import SIZES, random_states
from safetensors.torch import save_file

from semaim import checkpoints
from semaim.checkpoints.files import read_checkpoint, write_checkpoint
from semaim.checkpoints.safe_reading import read_file
from semaim.cli.checkpoint import inspected
from semaim.errors import UserError

P = b"\x80\x02"
#: A view of a storage of four floats, as torch pickles it, with its offset, sizes and strides.
VIEW = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0000X\x03\0\0\0cpu%stQ%s(%st(%s"
    b"t\x89ccollections\nOrderedDict\n)RtR"
)


def number(value):
    return b"\x8a\x08" + struct.pack("<q", value)


def view(offset, size, stride, count=4):
    """A pickle of {"w": tensor}."""
    parts = (number(count), number(offset), b"".join(map(number, size)), b"".join(map(number, stride)))
    return P + b"}X\x01\0\0\0w" + VIEW % parts + b"s."


def zipped(path, code, data=b"\0" * 16, how=zipfile.ZIP_STORED, count=1):
    with zipfile.ZipFile(path, "w", how) as archive:
        archive.writestr("a/data.pkl", code)
        for place in range(count):
            archive.writestr(f"a/data/{place}", data)
    return path


def refused(path, message):
    """Both readers refuse a file, with less than 64 MB on the way."""
    tracemalloc.start()
    for read in (read_file, read_checkpoint):
        with pytest.raises(UserError, match=message if read is read_file else path.name) as error:
            read(path)
        assert str(error.value).isprintable(), "one line without control characters"
    assert tracemalloc.get_traced_memory()[1] < 64e6
    tracemalloc.stop()


FORGED = (
    b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85"
    b"c_codecs\nencode\nX\x01\0\0\0bX\x06\0\0\0latin1\x86RtR"
)
#: Lists of the list before, twice each: 2 ** 60 items in a few bytes.
TWICE = b"".join(b"](h%sh%seq%s" % ((bytes([n]),) * 2 + (bytes([n + 1]),)) for n in range(60))
#: One list of pairs, of which many dicts are made.
PAIRS = b"](" + b"K\x01K\x02\x86" * 5000 + b"eq\0"
DTYPE = b"cnumpy\ndtype\nX\x02\0\0\0%s\x85R"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (P + FORGED + b"(K\x01K\x01\x85" + DTYPE % b"O8" + b"\x89C\x08AAAAAAAAtb.", "an array of 'O8'"),
        (P + DTYPE % b"f8" + b"(K\x03X\x01\0\0\0|NX\x01\0\0\0a\x85}K\x08K\x01K?tb.", "several fields"),
        (P + FORGED + b"(K\x01M\xff\xff\x85" + DTYPE % b"f8" + b"\x89C\x08AAAAAAAAtb.", "cannot reshape"),
        (P + b"}(" + b")" + b"\x85" * 50_000 + b"K\x01u.", "a tuple is a key"),
        (P + b"]" * 50_000 + b"a" * 49_999 + b".", "nested too deeply"),
        (P + b"]q\0h\0a.", "nested too deeply, or in itself"),
        (P + b"]q\0" + TWICE + b".", "repeats itself too often"),
        (P + PAIRS + b"ccollections\nOrderedDict\nh\0\x85R0" * 5000 + b"N.", "16 times"),
        (P + b"X\xff\xff\xff\x7fa.", "only 2 remain"),
        (P + b"\x8e" + struct.pack("<Q", 2**62) + b"a.", "only 2 remain"),
        (P + b"\x8b" + struct.pack("<i", 10_000) + b"\x7f" * 10_000 + b".", "operation LONG4"),
        (P + b"}X\x03\0\0\0\x1b[2K\x01s.", "control characters"),
        (P + b"ccollections\nOrderedDict\nK\x05\x85R.", "broken or no checkpoint"),
        (P + b"(cos\nsystem\no.", "would call"),
        (b"", "broken or no checkpoint"),
    ],
)  # fmt: skip
def test_forged_pickles_are_refused(code, message, tmp_path):
    (tmp_path / "x.pkl").write_bytes(code)
    refused(tmp_path / "x.pkl", message)
    if b"numpy" not in code:  # arrays are stand-ins in torch's files
        refused(zipped(tmp_path / "x.pth", code), "x.pth")


def test_a_memo_of_a_far_place_takes_no_memory(tmp_path):
    """Python's own unpickler would fill an array of 32 GB for these bytes."""
    (tmp_path / "x.pkl").write_bytes(P + b"}r\xff\xff\xff\x7f.")
    assert read_file(tmp_path / "x.pkl") == {}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (view(1, [4], [1]), "larger than its storage of 16 bytes"),
        (view(0, [2, 4], [2, 1]), "larger than its storage"),
        (view(-1, [4], [1]), "other than whole numbers"),
        (view(3, [4], [-1]), "other than whole numbers"),
        (view(0, [10**9], [0]), "16 times as large"),
        (view(0, [2**40, 2**40], [0, 0]), "16 times as large"),
        (view(0, [8], [1], 8), "lacks 32 bytes"),
        (view(0, [4], [1]).replace(b"FloatStorage", b"QInt8Storage"), "QInt8Storage"),
        (view(0, [4], [1]).replace(b"_tensor_v2", b"_qtensor"), "sparse, quantised, nested or other"),
        (view(0, [4], [1]).replace(b"_tensor_v2", b"_parameter"), "a parameter is no tensor"),
        (P + b"ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85R.", "would call torch.FloatTensor"),
        (P + b"ctorch.storage\nUntypedStorage\nJ\xff\xff\xff\x7f\x85\x81.", "not stored in it"),
    ],
)
def test_tensors_outside_of_their_storage_are_refused(code, message, tmp_path):
    refused(zipped(tmp_path / "x.pth", code), message)


def test_what_a_harmless_call_would_allocate_is_not(tmp_path):
    zipped(tmp_path / "x.pth", P + b"}X\x01\0\0\0ac__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85Rs.")
    assert read_file(tmp_path / "x.pth") == {"a": []}


def test_a_view_of_all_its_storage_is_read(tmp_path):
    """The forged ones above are refused for what is forged in them."""
    assert read_file(zipped(tmp_path / "x.pth", view(0, [2, 2], [1, 2])))["w"].equal(torch.zeros(2, 2))


# Zip files


def test_compressed_overlapping_and_doubled_members_are_refused(tmp_path):
    code = view(0, [10**7], [1], 10**7)
    refused(zipped(tmp_path / "x.pth", code, b"\0" * 4 * 10**7, zipfile.ZIP_DEFLATED), "compressed")
    data = bytearray(zipped(tmp_path / "y.pth", view(0, [4], [1]), count=2).read_bytes())
    last = data.rfind(b"PK\x01\x02")
    other = data.rfind(b"PK\x01\x02", 0, last)
    data[last + 42 : last + 46] = data[other + 42 : other + 46]
    (tmp_path / "y.pth").write_bytes(data)
    refused(tmp_path / "y.pth", "larger than its place")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "y.pth", "a") as archive:
        archive.writestr("a/data/0", b"\0" * 16)
    refused(tmp_path / "y.pth", "two members of one name|larger than its place")


def contents():
    """A file's content with every kind of tensor that a state dict may hold."""
    base = torch.arange(24, dtype=torch.float32).reshape(6, 4)
    plain = {
        "tied": base, "tied again": base, "columns": base.t(), "part": base[2:4, 1:], "bfloat16": base.bfloat16(),
        "empty": torch.empty(0, 3), "scalar": torch.tensor(2.5), "bool": torch.tensor([True, False]),
        "complex": torch.ones(2, dtype=torch.complex64), "long": torch.arange(3), "expanded": torch.ones(1).expand(5),
    }  # fmt: skip
    kinds = {"float8": torch.ones(3).to(torch.float8_e4m3fn), "uint16": torch.ones(2, dtype=torch.uint16)}
    return {**plain, "parameter": torch.nn.Parameter(torch.ones(2))}, kinds


@pytest.mark.parametrize("zip_file", [True, False])
def test_tensors_of_every_kind_are_read_as_torch_reads_them(zip_file, tmp_path):
    plain, kinds = contents()
    content = {**plain, **(kinds if zip_file else {}), "state": torch.nn.BatchNorm1d(3).state_dict()}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zip_file)
    ours, torchs = read_file(tmp_path / "x.pth"), torch.load(tmp_path / "x.pth", weights_only=True)
    assert ours.keys() == torchs.keys() and ours["state"].keys() == torchs["state"].keys()
    for name, tensor in {**torchs, **torchs["state"]}.items():
        if isinstance(tensor, torch.Tensor):
            mine = {**ours, **ours["state"]}[name]
            assert (mine.dtype, mine.shape, mine.stride()) == (tensor.dtype, tensor.shape, tensor.stride()), name
            assert torch.equal(mine.float(), tensor.float()) if not mine.is_complex() else mine.equal(tensor), name
    assert ours["tied"].data_ptr() == ours["tied again"].data_ptr() == ours["columns"].data_ptr()


def test_a_file_written_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_file(tmp_path / "x.pth")["a"].equal(torch.ones(3))


def test_a_flipped_bit_is_named_with_its_tensor(tmp_path):
    """torch.load takes the same file without a word."""
    weights = {f"blocks.{n}.weight": torch.full((64,), float(n)) for n in range(3)}
    write_checkpoint({"format": "semaim", "model": weights}, tmp_path / "ours.pth")
    torch.save({"state_dict": weights, "meta": {"x": np.float64(1)}}, tmp_path / "foreign.pth")
    for name in ("ours.pth", "foreign.pth"):
        data = bytearray((tmp_path / name).read_bytes())
        data[data.index(torch.full((64,), 2.0).numpy().tobytes()) + 100] ^= 4
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=rf"{name} is damaged: \w+/data/2, which holds blocks.2.weight, does not"):
            read_file(tmp_path / name)
    assert not torch.load(tmp_path / "ours.pth", weights_only=True)["model"]["blocks.2.weight"].equal(
        torch.ones(64) * 2
    )
    one_line(tool("checkpoint.py", "inspect", tmp_path / "foreign.pth"), "foreign.pth is damaged: ")
    with pytest.raises(UserError, match=r"ours.pth.*blocks.2.weight"):
        read_checkpoint(tmp_path / "ours.pth")
    assert read_checkpoint(tmp_path / "ours.pth", mmap=True).keys() == {"format", "model"}, "a quick look tests nothing"


def test_old_files_with_other_sizes_of_storages_are_refused(tmp_path):
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(8)}, buffer, _use_new_zipfile_serialization=False)
    data = buffer.getvalue()
    at = data.index(torch.ones(8).numpy().tobytes()) - 8
    for size in (7, 9, 2**40, -1):
        (tmp_path / "x.pth").write_bytes(data[:at] + struct.pack("<q", size) + data[at + 8 :])
        refused(tmp_path / "x.pth", "it lacks 32 bytes of the storage")
    for short in (data[:-1], data[: at + 3], data[: at - 20]):
        (tmp_path / "x.pth").write_bytes(short)
        refused(tmp_path / "x.pth", "broken or no checkpoint")


def test_arrays_that_are_made_again_and_again_are_refused(tmp_path):
    """A few bytes that make a new array of the same million bytes."""
    call = b"cnumpy._core.numeric\n_frombuffer\n(h\0" + DTYPE % b"u1" + b"J\x40\x42\x0f\0\x85X\x01\0\0\0CtR"
    code = b"\x80\x04B" + struct.pack("<I", 10**6) + b"a" * 10**6 + b"q\0"
    (tmp_path / "x.pkl").write_bytes(code + call + b".")
    assert read_file(tmp_path / "x.pkl").nbytes == 10**6
    (tmp_path / "x.pkl").write_bytes(code + b"](" + call * 100 + b"e.")
    refused(tmp_path / "x.pkl", "16 times as large")


# What is in a readable file


def ours(folder, **config):
    """A checkpoint of ours with a changed config."""
    network = {**SIZES, **config.pop("network", {})}
    content = {"format": "semaim", "model": random_states()["encoder"], "epoch": 3, "classes": 3}
    content["config"] = {"model": {"type": "Pretraining", "network": network}, **config}
    torch.save(content, folder / "x.pth")
    return folder / "x.pth"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"network": {"depth": 10**9}}, "network.depth is '1000000000': give whole numbers from 1 to 1,000"),
        ({"network": {"num_heads": 0}}, "num_heads is '0'"),
        ({"network": {"num_heads": "x\x1b[2J"}}, "num_heads is"),
        ({"network": {"img_size": [0, 0]}}, "img_size is"),
        ({"network": {"img_size": float("nan")}}, "img_size is"),
        ({"model": 3}, "config.model is no mapping but '3'"),
        ({"model": {"network": [1]}}, "config.model.network is no mapping"),
        ({"dataset": "x"}, "config.dataset is no mapping"),
    ],
    ids=str,
)
def test_forged_settings_are_refused(config, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        inspected(ours(tmp_path, **config))
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("blocks.999999999.norm1.weight", torch.ones(3), "block 999999999 of 31 tensors"),
        (f"blocks.{'9' * 5000}.norm1.weight", torch.ones(3), "block 99999999999999999999 of"),
        ("pos_embed", torch.ones(()), r"pos_embed has the shape \(\)"),
        ("pos_embed", torch.ones(3), r"pos_embed has the shape \(3,\)"),
        ("patch_embed.proj.weight", torch.empty(0, 3, 8, 8), r"has the shape \(0, 3, 8, 8\)"),
        ("head.weight", torch.ones(()), r"head.weight has the shape \(\)"),
        ("cls_token", torch.empty(0), r"cls_token has the shape \(0,\)"),
    ],
)
def test_forged_shapes_are_refused(name, tensor, message, tmp_path):
    torch.save({"model": {**random_states()["encoder"], name: tensor}}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=message):
        checkpoints.inspect(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{" * 100_000, "config.json is broken"),
        (json.dumps({"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 10**9}}), "model_args.depth is"),
    ],
)
def test_forged_configs_next_to_weights_are_refused(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    save_file(random_states()["encoder"], tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        checkpoints.read(tmp_path / "model.safetensors")
