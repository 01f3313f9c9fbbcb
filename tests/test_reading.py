"""A command reads its checkpoint, annotations and folders of images once, counted in the process that trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT

from semaim.engine.locking import PARTIAL
from semaim.reading import forget, once, read_json, read_once, write_json


@pytest.mark.parametrize("fails", ["write_text", "replace"])
def test_a_json_file_is_the_earlier_one_or_whole(fails, tmp_path, monkeypatch):
    file = tmp_path / "stage.json"
    write_json(file, {"settings": 1})
    write_json(file, {"settings": 2})
    assert read_json(file) == {"settings": 2} and list(tmp_path.iterdir()) == [file]

    def killed(*arguments):
        if fails == "write_text":
            arguments[0].write_bytes(b'{"sett')
        raise KeyboardInterrupt

    monkeypatch.setattr(*((Path, "write_text") if fails == "write_text" else (os, "replace")), killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(file, {"settings": 3})
    assert read_json(file) == {"settings": 2}
    (left,) = set(tmp_path.iterdir()) - {file}
    assert PARTIAL.fullmatch(left.name)  # the next run in the folder removes it


#: Runs a command and counts, by file: parsed JSON and unpickled checkpoints until the training starts, and listings.
COUNTING = """
import collections, json, os, sys
from semaim.checkpoints import storages
counts, training = collections.Counter(), [False]

def counted(module, name, kind):
    inner = getattr(module, name)
    def call(*arguments, **options):
        if not training[0]:
            counts[kind(*arguments)] += 1
        return inner(*arguments, **options)
    setattr(module, name, call)

size = lambda text, **_: f"json of {len(text)}" if isinstance(text, (bytes, str)) and len(text) > 2000 else "small json"
counted(json, "loads", size)
counted(json, "load", lambda file, **_: "json file " + os.path.basename(getattr(file, "name", "?")))
counted(storages, "_load_zip", lambda path, *_: "checkpoint " + os.path.basename(str(path)))
counted(os, "walk", lambda top, *_: "folder " + os.path.basename(str(top)))

from mmengine.runner import Runner
from semaim.cli import train
from semaim.errors import run
started = Runner.train
def start(self):
    training[0] = True
    return started(self)
Runner.train = start
code = run(lambda: train.main(sys.argv[1:]))
print("COUNTS", json.dumps(counts))
sys.exit(code)
"""


def count(*arguments):
    line = [sys.executable, "-c", COUNTING, *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stderr
    (found,) = [line for line in done.stdout.splitlines() if line.startswith("COUNTS ")]
    return json.loads(found.removeprefix("COUNTS "))


SMALL = ["model.network.embed_dim=32", "model.network.num_heads=2", "model.network.depth=2", "total_batch_size=8"]
SMALL += ["num_workers=0", "model.network.img_size=32"]


@pytest.mark.slow
def test_a_run_walks_its_images_once_and_resuming_reads_its_checkpoint_once(scenes, tmp_path):
    line = ["semaim/configs/pretrain/semaim_vit_tiny_scenes.py", "--data-root", scenes, "--work-dir", tmp_path / "run"]
    short = ["--cfg-options", *SMALL, "train_cfg.max_epochs=1", "default_hooks.pictures.interval=0"]
    assert count(*line, *short)["folder train"] == 1
    longer = ["--resume", "--override", "--cfg-options", "train_cfg.max_epochs=2"]
    counts = count(*line, *longer)
    assert counts["folder train"] == 1
    assert sum(number for what, number in counts.items() if what.startswith("checkpoint ")) == 1, counts


@pytest.mark.slow
def test_a_detector_parses_its_annotations_once_a_split(tmp_path):
    pytest.importorskip("mmdet", reason="mmdet is not installed: runs after tools/setup.sh --extras all")
    from semaim.data.scenes import write_scenes

    write_scenes(tmp_path / "scenes", 20, 64, seed=0)
    files = [tmp_path / f"scenes/coco/annotations/instances_{split}.json" for split in ("train", "val")]
    files = [file for file in files if file.is_file()] or sorted((tmp_path / "scenes/coco").rglob("*.json"))
    assert len(files) == 2
    small = {"embed_dim": 32, "num_heads": 2, "depth": 2}
    options = [f"model.backbone.{key}={value}" for key, value in small.items()]
    options += ["model.neck.in_channels=32", "total_batch_size=2", "images_per_gpu=2", "num_workers=0"]
    options += ["train_cfg.max_iters=1", "train_cfg.val_interval=1"]
    line = ["mmdet_configs/semaim_mask_rcnn_scenes.py", "--data-root", tmp_path / "scenes/coco"]
    counts = count(*line, "--work-dir", tmp_path / "run", "--cfg-options", *options)
    for file in files:
        assert counts.get(f"json of {file.stat().st_size}") == 1, counts
        assert f"json file {file.name}" not in counts, counts


def test_what_is_read_once_follows_the_file(tmp_path):
    file, reads = tmp_path / "a.txt", []

    def read(path):
        reads.append(path)
        return path.read_text()

    file.write_text("one")
    assert once(file, read) == once(file, read) == "one" and len(reads) == 2, "nothing is kept outside"
    with read_once():
        with read_once():
            assert once(file, read) == once(file, read) == "one" and len(reads) == 3
        assert once(file, read) == "one" and len(reads) == 3
        assert once(file, read, "another kind") == "one" and len(reads) == 4
        file.write_text("three")
        assert once(file, read) == "three" and len(reads) == 5
        forget()
        assert once(file, read) == once(file, read) == "three" and len(reads) == 7
        with pytest.raises(FileNotFoundError):
            once(tmp_path / "gone", read)
    with read_once():
        assert once(file, read) == once(file, read) and len(reads) == 9
