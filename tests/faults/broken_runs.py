"""Folders of runs in which one is broken, by seed: what strangers' folders may hold, and what disks do to files."""

import json
import os
import random
import shutil
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from semaim.outcomes import write_outcomes

WHOLE = {
    "config": "vit_base_100e.py", "metrics": {"top1": 84.3, "top5": 96.5, "loss": 0.7}, "data": "data/imagenet",
    "checkpoint": "work_dirs/semaim_vit_base_800e/latest.pth", "train_images": 1281167, "val_images": 20, "seed": 0,
    "epochs": 100, "device": "1 x CPU", "date": "2026-01-02T03:04:05", "method": "SemAIM", "backbone": "ViT-B",
    "task": "fine-tuning", "pretrain_config": "semaim_vit_base_800e.py", "pretrain_epochs": 800, "scales": [1.0],
    "pretrain_images": 1281167, "cfg_options": {"seed": 1, "a.b": [1]}, "commit": "0123abc", "mean": [0.5, 0.5, 0.5],
    "images": {"crop_mode": "center"}, "load_report": {"matched": 3}, "classes": 10, "classes_evaluated": 10,
}  # fmt: skip
#: The figure and the folder of the run that stays whole, in every output.
GOOD = 77.25
DEEP = "[" * 5000 + "]" * 5000
#: Values in place of others, as JSON.
ODD = (
    *("null", "true", "-1", "0", "NaN", "Infinity", "-Infinity", "1e308", "1e-320", "1" + "0" * 400, "1" + "0" * 5000),
    *('""', '"\\u0000"', '"\\ud800"', '"\\u001b[2J"', '"<script>alert(1)</script>"', '"{{ 7 * 7 }}"', '"$x_{$"'),
    *("[]", "{}", "[[]]", '{"a": {"b": [null]}}', DEEP, '"' + "x" * 100_000 + '"', '"../../../../etc/passwd"'),
    *('"\\u202e|`*_~%&#"', '[1, "a", null]', "[NaN]", '{"label": 3}', '{"x": {"label": "a", "factor": "b"}}'),
)
JSON = ("results.json", "stage.json", "sweep.json", "centres.json", "1/vis_data/scalars.json", "x/predictions.json")


def write_run(folder: Path, **changes) -> None:
    """A whole run with everything that a run may leave."""
    for name in ("1/vis_data", "orders", "x"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    content = {**WHOLE, **changes}
    (folder / "results.json").write_text(json.dumps(content, indent=1))
    right = np.arange(20) < round(content["metrics"]["top1"] / 5)
    content["metrics"]["top1"] != GOOD and write_outcomes(folder, [f"{n}.jpg" for n in range(20)], {"top1": right})
    lines = [{"loss": 1 / n, "lr": 1e-3, "iter": n, "epoch": n, "images_per_second": 5.0} for n in range(1, 9)]
    lines.append({"top1": 50.0, "step": 1})
    (folder / "1/vis_data/scalars.json").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (folder / "1/vis_data/config.py").write_text("task = 'finetune'\nseed = 0\nmodel = dict(type='Classifier')\n")
    log = "2026/01/02 03:04:05 - mmengine - INFO - torch 2 on 1 x CPU; seed 0\n| class | IoU | Acc |\n| a | 1 | 2 |\n"
    (folder / "1/1.log").write_text(log + "2026/01/02 04:04:05 - mmengine - INFO - end\n")
    settings = {"settings": {"config": "c.py", "options": {}}, "processes": 1}
    (folder / "stage.json").write_text(json.dumps(settings))
    (folder / "sweep.json").write_text(json.dumps({**settings, "base_lr": 0.1, "peak_lr": 0.1, "layer_decay": None}))
    row = {"used": True, "checkpoint": "x", "on_object": 0.5, "chance": 0.2, "best_fixed": 0.3, "images": 10}
    (folder / "centres.json").write_text(json.dumps({"rows": [row]}))
    (folder / "x/predictions.json").write_text(json.dumps([{"image_id": 1}]))
    for name in ("orders/epoch_0001.png", "predictions.png"):
        Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(folder / name)
    (folder / "latest.pth").write_bytes(b"PK\x03\x04")


def mutate(folder: Path, seed: int) -> str:
    """Break one or two files of a run; returns in words what was done."""
    draw = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    done = []
    for _ in range(draw.choice((1, 1, 2))):
        path = draw.choice([*files, *(folder / name for name in JSON), folder / "results.json"])
        odd_json = path.suffix == ".json" and draw.random() < 0.6
        ways = VALUES if odd_json else KINDS if draw.random() < 0.4 or not path.is_file() else BYTES
        way = draw.choice(ways)
        if path.is_file() or way in KINDS:
            way(path, draw)
            done.append(f"{way.__name__} {path.relative_to(folder)}")
    return ", ".join(done)


# Bytes


def flips(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 3, 30)) if data else 0):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncated(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data) + 1)])


def emptied(path: Path, draw: random.Random) -> None:
    path.write_bytes(b"")


def noise(path: Path, draw: random.Random) -> None:
    path.write_bytes(draw.randbytes(draw.choice((1, 100, 5000))))


def inserted(path: Path, draw: random.Random) -> None:
    data, place = path.read_bytes(), draw.randrange(200)
    path.write_bytes(
        data[:place] + draw.choice((b"\xff\xfe", b"\0", b"\xed\xa0\x80", b"\n", b"]", b"{")) + data[place:]
    )


def nested(path: Path, draw: random.Random) -> None:
    sign = draw.choice(("[", "(", "-", "{'a':", "not ", "x.", '{"a":'))
    path.write_text("a = " * draw.randrange(2) + sign * draw.choice((150, 5000, 100_000)) + "1")


def date(path: Path, draw: random.Random) -> None:
    path.write_text(
        "9999/99/99 99:99:99 - x\n| class | a | b |\n|\n||||||\n+-\n\n" + "Evaluating bbox...\n| category | AP |\n"
    )


def bomb(path: Path, draw: random.Random) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (%d,), }" % draw.choice((10**7, 10**12, -1))
        start = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
        archive.writestr("names.npy", start + b"\0" * draw.choice((0, 4 * 10**7)))
        archive.writestr("top1.npy", b"\x80\x04cos\nsystem\nX\x04\0\0\0true\x85R.")


BYTES = (flips, flips, truncated, emptied, noise, inserted, nested, date, bomb)

# What is no regular file


def fifo(path: Path, draw: random.Random) -> None:
    gone(path, draw)
    os.mkfifo(path)


def directory(path: Path, draw: random.Random) -> None:
    gone(path, draw)
    path.mkdir()


def dangling(path: Path, draw: random.Random) -> None:
    gone(path, draw)
    path.symlink_to(draw.choice(("nowhere", path.name, "/dev/zero", "/dev/full", "..")))


def gone(path: Path, draw: random.Random) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


KINDS = (fifo, directory, dangling, gone)

# Values


def value(path: Path, draw: random.Random) -> None:
    """Replace a value, at any depth, or add one."""
    lines = (
        path.read_text(errors="replace").splitlines() if "scalars" in path.name else [path.read_text(errors="replace")]
    )
    place = draw.randrange(len(lines) or 1)
    try:
        content = json.loads(lines[place])
    except (ValueError, IndexError, RecursionError):
        return
    holder, slots = content, []
    waiting = [content] if isinstance(content, dict | list) else []
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        slots += [(holder, key) for key in keys]
        waiting += [holder[key] for key in keys if isinstance(holder[key], dict | list)]
    if not slots:
        return
    holder, key = draw.choice(slots)
    if isinstance(holder, dict) and draw.random() < 0.2:
        key = draw.choice(
            ("reported", "task", "overrides", "left_out", "stage", "iterations", "<script>alert(1)</script>")
        )
    holder[key] = "@@"
    if isinstance(holder, dict) and draw.random() < 0.1:
        del holder[key]
    lines[place] = json.dumps(content).replace('"@@"', draw.choice(ODD))
    path.write_text("\n".join(lines))


def whole(path: Path, draw: random.Random) -> None:
    path.write_text(draw.choice(ODD))


VALUES = (value, value, value, value, whole)
