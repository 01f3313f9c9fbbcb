"""Features and what is made of them: extraction to files by one and by two processes, k-NN, linear probe."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from semaim.engine import extraction
from semaim.engine.extraction import extract_features, gather_rows, reduce_sum
from semaim.engine.features import knn_accuracy
from semaim.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
LENGTH, WIDTH = 23, 6
SHAPES = {"features": (WIDTH,)}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clusters(per_class, classes=6, width=8, noise=1.0, seed=0):
    """Features around a centre per class, in shuffled order, and labels."""
    labels = torch.arange(classes).repeat_interleave(per_class)
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    return random(classes, width, seed=100)[labels] + noise * random(len(labels), width, seed=seed), labels


# Extraction


def encode(images):
    """(B, 3, 2, 2) -> (B, 6): any function that tells images apart."""
    return {"features": images.flatten(1)[:, :6] * 2 + images.mean(dim=(1, 2, 3))[:, None]}


def other(images):
    """What another encoder makes of them."""
    return {"features": encode(images)["features"] + 1}


def images():
    return random(LENGTH, 3, 2, 2, seed=7)


def labels():
    return torch.arange(LENGTH) * 5 % 7


def loader(indices=None, batch=4, rank=0, world=1, change=None):
    """Batches of a process's share, last image first."""
    indices = torch.arange(LENGTH) if indices is None else torch.tensor(indices)
    pixels = images()
    if change:
        change(pixels)
    for index in indices[rank::world].flip(0).split(batch):
        yield {"image": pixels[index % LENGTH], "label": labels()[index % LENGTH], "index": index}


def extract(source=None, function=encode, **options):
    if "key" in options:
        options["key"] = {"weights": options["key"]}
    return extract_features(function, loader() if source is None else source, LENGTH, SHAPES, "cpu", **options)


def assert_right(found):
    features, found_labels = found["features"], found["labels"]
    assert features.dtype == np.float16 and found_labels.dtype == np.int64
    np.testing.assert_array_equal(features, encode(images())["features"].half().numpy())
    np.testing.assert_array_equal(found_labels, labels().numpy())


def never(_):
    raise AssertionError("encoded again")


def test_features_in_memory_are_in_order():
    found = extract()
    assert not isinstance(found["features"], np.memmap)
    assert_right(found)


def test_no_gradient_is_kept():
    weight = torch.ones(WIDTH, requires_grad=True)
    seen = []

    def record(images):
        seen.append(encode(images)["features"] * weight)
        return {"features": seen[-1]}

    assert_right(extract(function=record))
    assert not any(part.requires_grad for part in seen)


def flip(path):
    """One bit of the last value."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_files_are_reused(tmp_path):
    lines = []
    found = extract(cache=tmp_path / "a/b", key="one", log=lines.append)
    assert isinstance(found["features"], np.memmap) and not found["features"].flags.writeable
    assert_right(found)
    assert sorted(path.name for path in (tmp_path / "a/b").iterdir()) == ["done.json", "features.npy", "labels.npy"]
    assert_right(extract(function=never, cache=tmp_path / "a/b", key="one", log=lines.append))
    assert lines == [f"23 features written to {tmp_path}/a/b", f"23 features read from {tmp_path}/a/b"]
    assert_right(found)


def test_another_key_is_made_again(tmp_path):
    old = extract(function=other, cache=tmp_path, key="one")["features"]
    before, lines = old.copy(), []
    assert_right(extract(cache=tmp_path, key="two", log=lines.append))
    assert lines[0] == f"features in {tmp_path} are extracted anew: weights changed"
    np.testing.assert_array_equal(old, before)  # who still reads the old file goes on
    assert_right(extract(function=never, cache=tmp_path, key="two"))
    with pytest.raises(AssertionError, match="encoded again"):
        extract(function=never, cache=tmp_path, key="one")


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "done.json").unlink(),
        lambda folder: (folder / "done.json").write_text('{"key": "o'),
        lambda folder: (folder / "labels.npy").unlink(),
        lambda folder: os.truncate(folder / "features.npy", 200),
        lambda folder: os.truncate(folder / "labels.npy", 0),
        lambda folder: np.save(folder / "features.npy", np.zeros((LENGTH, WIDTH + 1), np.float16)),
        lambda folder: np.save(folder / "labels.npy", np.zeros(LENGTH - 1, np.int64)),
        lambda folder: np.save(folder / "features.npy", np.load(folder / "features.npy")[::-1]),
        lambda folder: np.save(folder / "labels.npy", np.load(folder / "labels.npy")[::-1]),
        lambda folder: flip(folder / "features.npy"),
    ],
)
def test_damaged_files_are_made_again(tmp_path, harm):
    extract(function=other, cache=tmp_path, key="one")
    harm(tmp_path)
    assert_right(extract(cache=tmp_path, key="one"))


def test_an_interrupted_extraction_is_not_finished(tmp_path):
    extract(function=other, cache=tmp_path, key="one")

    def interrupted():
        yield next(loader())
        assert not (tmp_path / "done.json").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(interrupted(), cache=tmp_path, key="two")
    for key in ("one", "two"):
        with pytest.raises(AssertionError, match="encoded again"):
            extract(function=never, cache=tmp_path, key=key)
    assert_right(extract(cache=tmp_path, key="two"))


def test_another_length_is_made_again(tmp_path):
    extract(cache=tmp_path, key="one")
    source = loader(range(10))
    key = {"weights": "one"}
    found = extract_features(encode, source, 10, SHAPES, "cpu", cache=tmp_path, key=key)
    assert found["features"].shape == (10, WIDTH) and len(found["labels"]) == 10


def both(images):
    """Vectors, and two tokens an image."""
    return encode(images) | {"tokens": images[:, :2].flatten(2)}


def test_one_pass_makes_all_that_is_read_and_later_ones_only_what_is_missing(tmp_path):
    wanted, lines = {"features": (WIDTH,), "tokens": (2, 4)}, []

    def run(function, *names, key="one"):
        shapes = {name: wanted[name] for name in names}
        options = {"cache": tmp_path, "key": {"weights": key}, "log": lines.append}
        return extract_features(function, loader(), LENGTH, shapes, "cpu", **options)

    def tokens_only(images):
        return {"tokens": both(images)["tokens"]}

    first = run(both, "features", "tokens")
    assert_right(first)
    np.testing.assert_array_equal(first["tokens"], images()[:, :2].flatten(2).half().numpy())
    assert set(run(never, "tokens")) == {"tokens", "labels"}
    # Another key: only what is read, and what the folder had of the old one is gone.
    assert set(run(encode, "features", key="two")) == {"features", "labels"}
    assert not (tmp_path / "tokens.npy").exists()
    second = run(tokens_only, "features", "tokens", key="two")  # the vectors are read, the tokens made
    assert_right(second)
    np.testing.assert_array_equal(second["tokens"], first["tokens"])
    assert_right(run(never, "features", key="two"))
    with pytest.raises(ValueError, match=r"\(4, 2, 4\) in place of \(4, 3, 4\)"):
        extract_features(both, loader(), LENGTH, {"tokens": (3, 4)}, "cpu")


def not_finite(pixels):
    pixels[3, 0, 0, 0], pixels[8, 0, 0, 0] = float("nan"), 1e5


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(indices=[i for i in range(LENGTH) if i not in (5, 6)]), "2 of 23 images were not loaded.*image 5"),
        (dict(indices=[*range(LENGTH), 4]), "1 of 23 images.*more than once.*image 4"),
        (dict(indices=[*range(LENGTH), 23]), "image 23 is none of 0 to 22"),
        (dict(indices=[*range(LENGTH), -1]), "image -1 is none of 0 to 22"),
        (dict(change=not_finite), "features of 2 of 23 images are not finite"),
    ],
)
def test_what_is_wrong_with_a_loader(tmp_path, options, message, cached):
    with pytest.raises(UserError, match=message):
        extract(loader(**options), **(dict(cache=tmp_path, key="one") if cached else {}))
    assert not (tmp_path / "done.json").exists()


def test_features_of_another_width():
    with pytest.raises(ValueError, match=r"\(4, 1\) in place of \(4, 6\)"):
        extract(function=lambda images: {"features": encode(images)["features"][:, :1]})


def test_a_cache_needs_a_key(tmp_path):
    with pytest.raises(ValueError, match="key"):
        extract(cache=tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write features to .*file/sub"):
        extract(cache=tmp_path / "file/sub", key="one")


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match="cannot write.*No space left"):
        extract(cache=tmp_path, key="one")


def test_rows_lost_by_the_file_system_are_noticed(tmp_path, monkeypatch):
    opened = []

    def forgetful(cache, names, mode, real=extraction._open):
        opened.append(mode)
        if mode == "r" and opened.count("r+"):
            np.load(cache / "features.npy", mmap_mode="r+")[3] = 0
        return real(cache, names, mode)

    monkeypatch.setattr(extraction, "_open", forgetful)
    with pytest.raises(UserError, match="does not hold what the processes wrote"):
        extract(cache=tmp_path, key="one")
    assert not (tmp_path / "done.json").exists()


# Two processes

WORKER = """
import sys, pathlib, torch
import torch.distributed as dist
sys.path[:0] = [str(pathlib.Path(sys.argv[0]).parent), {tests!r}]
import numpy as np
import test_features as t
from semaim.engine.launcher import leave

rank, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{{folder}}/meeting", rank=rank, world_size=2)
assert t.reduce_sum(torch.tensor([rank + 1, 5])).tolist() == [3, 10]
share = lambda **options: t.loader(rank=rank, world=2, **options)
assert t.gather_rows(torch.arange(7)[rank::2] * 2, 7).tolist() == [0, 2, 4, 6, 8, 10, 12]
t.assert_right(t.extract(share(), cache=folder / "cache", key="one"))
dist.barrier()
t.assert_right(t.extract(share(), t.never, cache=folder / "cache", key="one"))
t.assert_right(t.extract(share(), cache=folder / "cache", key="two"))
for options, change in ((dict(), dict(indices=range(t.LENGTH - 1))), (dict(), dict(change=t.not_finite))):
    try:
        t.extract(share(**change), cache=folder / "bad", key="one")
        sys.exit("no error")
    except t.UserError as error:
        (folder / f"error{{rank}}").open("a").write(str(error) + "\\n")
try:
    t.extract(share())
    sys.exit("no error")
except t.UserError as error:
    assert "cache" in str(error)
bank, queries = t.clusters(9, noise=1.5), t.clusters(3, noise=1.5, seed=1)
queries = queries[0][:17], queries[1][:17]
(folder / f"knn{{rank}}").write_text(repr(t.knn_accuracy(*bank, *queries, 6, (1, 5), chunk=4)))
one = t.knn_accuracy(*bank, queries[0][:1], queries[1][:1], 6, (5,))  # the second process has no query
(folder / f"one{{rank}}").write_text(repr(one))
leave()
"""


def test_two_processes_give_what_one_gives(tmp_path):
    script = WORKER.format(tests=str(ROOT / "tests"))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
            cwd=ROOT,
        )  # fmt: skip
        for rank in range(2)
    ]
    try:
        outputs = [run.communicate(timeout=180)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], "\n".join(outputs)
    assert_right({name: np.load(tmp_path / f"cache/{name}.npy") for name in ("features", "labels")})
    assert json.loads((tmp_path / "cache/done.json").read_text())["key"] == {"weights": "two"}
    errors = (tmp_path / "error0").read_text()
    assert errors == (tmp_path / "error1").read_text()
    assert "1 of 23 images were not loaded" in errors and "2 of 23 images are not finite" in errors
    bank, (queries, found) = clusters(9, noise=1.5), clusters(3, noise=1.5, seed=1)
    expected = knn_accuracy(*bank, queries[:17], found[:17], 6, (1, 5))
    assert 20 < expected[5][0] < 90  # some are wrong: a share counted twice would show
    one = knn_accuracy(*bank, queries[:1], found[:1], 6, (5,))
    for rank in range(2):
        assert (tmp_path / f"knn{rank}").read_text() == repr(expected)
        assert (tmp_path / f"one{rank}").read_text() == repr(one)


def test_the_sum_of_one_process_is_its_own():
    assert reduce_sum(torch.tensor([1, 2])).tolist() == gather_rows(torch.tensor([1, 2]), 2).tolist() == [1, 2]


# k nearest neighbours


# Linear probe
