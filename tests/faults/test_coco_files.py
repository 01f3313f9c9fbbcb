"""Mutated COCO files: each is refused with one line, or the data sets, loaders and metric read all of it.

The files that pass go through mmdet's data sets, our pipelines and COCO's metric, as in a training and its validation.
"""

import gc
import json
import random
from collections import Counter

import pytest
from counts import record

pytest.importorskip("mmdet", reason="mmdet is not installed: runs after tools/setup.sh --extras all")

import numpy as np  # noqa: E402
from commands import ROOT, check_data  # noqa: E402
from mmengine.registry import METRICS  # noqa: E402
from pycocotools import mask  # noqa: E402

from semaim.data.scenes import write_scenes  # noqa: E402
from semaim.engine import dense  # noqa: E402
from semaim.engine.config import load_config, set_data_root  # noqa: E402
from semaim.errors import UserError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SCENES = "mmdet_configs/semaim_mask_rcnn_scenes.py"
SIDE = 32
ODD = [
    None, True, False, 0, 1, -1, 2.5, float("nan"), float("inf"), 1e30, -1e30, 10**30, 2**31, 2**63, "", "1", "a\nb",
    "\ud800", "a\0b", [], [1], [[1]], [[[1]]], {}, {"size": [SIDE, SIDE]}, {"counts": "", "size": [SIDE, SIDE]},
]  # fmt: skip


def valid(folder):
    """A small file with polygons, run lengths of both kinds, a crowd, and an annotation without height."""
    write_scenes(folder, 6, SIDE, seed=0, val_fraction=0.5)
    document = json.loads((folder / "coco/annotations/instances_train2017.json").read_text())
    for place, one in enumerate(document["annotations"]):
        x, y, w, h = one["bbox"]
        corners = [x, y, x + w, y, x + w, y + h, x, y + h]
        packed = mask.frPyObjects(one["segmentation"], SIDE, SIDE)
        text = {**packed, "counts": packed["counts"].decode()}
        kinds = [[corners], [corners, corners[:6]], one["segmentation"], text]
        one["segmentation"] = kinds[place % 4]
    document["annotations"][2]["iscrowd"] = 1
    flat = {"id": 90, "bbox": [3, 4, 5, 0], "area": 0, "segmentation": [[3, 4, 8, 4, 8, 4]]}
    document["annotations"].append({**document["annotations"][0], **flat})
    del document["annotations"][1]["iscrowd"]
    return document


def places(node, path=()):
    """The paths of all values in a document, except in long lists all but some."""
    yield path
    if isinstance(node, dict):
        for key in node:
            yield from places(node[key], (*path, key))
    elif isinstance(node, list):
        for index in range(len(node)):
            yield from places(node[index], (*path, index))


def changed(text, rng):
    """The text of a file with one or two mutations, and their names."""
    document, names = json.loads(text), []
    for _ in range(rng.choice((1, 1, 1, 2))):
        name = rng.choice(list(MUTATIONS))
        document = MUTATIONS[name](document, rng)
        names.append(name)
    # A byte of the text instead, now and then.
    written = json.dumps(document)
    if rng.random() < 0.08:
        names.append("truncated text")
        written = written[: rng.randrange(len(written))]
    elif rng.random() < 0.08:
        names.append("character changed")
        place = rng.randrange(len(written))
        written = written[:place] + rng.choice('0123456789-.eE,[]{}":a \0') + written[place + 1 :]
    return written, names


def _copy(value):
    return json.loads(json.dumps(value))


def _somewhere(document, rng, most=99):
    paths = [path for path in places(document) if path and len(path) <= most]
    path = rng.choice(paths)
    node = document
    for key in path[:-1]:
        node = node[key]
    return node, path[-1]


def _field(document, rng):
    """A record, and one of its keys; half of the time a segmentation."""
    lists = [rows for rows in document.values() if isinstance(rows, list)] if isinstance(document, dict) else []
    records = [one for rows in lists for one in rows if isinstance(one, dict) and one]
    if not records:
        return {}, "x"
    with_masks = [one for one in records if one.get("segmentation")]
    if with_masks and rng.random() < 0.4:
        return rng.choice(with_masks), "segmentation"
    one = rng.choice(records)
    return one, rng.choice(list(one))


def _drop(document, rng):
    node, key = _field(document, rng)
    if key in node:
        del node[key]
    return document


def _drop_anywhere(document, rng):
    node, key = _somewhere(document, rng)
    del node[key]
    return document


def _retype(document, rng):
    node, key = _field(document, rng)
    value = node.get(key)
    node[key] = rng.choice([str(value), [value], {"value": value}, float(value) if type(value) is int else None])
    return document


def _replace(document, rng):
    node, key = _field(document, rng)
    node[key] = _copy(rng.choice(ODD))
    return document


def _replace_anywhere(document, rng):
    node, key = _somewhere(document, rng)
    node[key] = _copy(rng.choice(ODD))
    return document


def _swap(document, rng):
    (one, key), (other, second) = _somewhere(document, rng), _somewhere(document, rng)
    one[key], other[second] = _copy(other[second]), _copy(one[key])
    return document


def _double(document, rng):
    rows = rng.choice([value for value in document.values() if isinstance(value, list) and value] or [[0]])
    rows.insert(rng.randrange(len(rows) + 1), _copy(rng.choice(rows)))
    return document


def _shape(document, rng):
    """A segmentation of short, odd, nested or far polygons."""
    node, _ = _field(document, rng)
    numbers = [rng.uniform(0, SIDE) for _ in range(rng.randrange(12))]
    far = [rng.choice([-1e9, 1e9, 2**31, 1e308, -SIDE, 2 * SIDE, float("nan")]) for _ in range(8)]
    shapes = [[numbers], [numbers, numbers[:5]], [numbers[:5], numbers], [far], [[numbers]], numbers, [], [[]]]
    node["segmentation"] = rng.choice([*shapes, [[], [1, 2, 9, 2, 9, 9]], [[1, 2, 9, 9], [1, 2, 9, 2, 9, 9]]])
    return document


def _runs(document, rng):
    """Run lengths with a changed byte, number or size."""
    rows = document.get("annotations") if isinstance(document, dict) else None
    shapes = [one.get("segmentation") for one in rows or () if isinstance(one, dict)]
    shapes = [shape for shape in shapes if isinstance(shape, dict) and shape.get("counts")]
    if not shapes:
        return document
    shape = rng.choice(shapes)
    counts = shape["counts"]
    place = rng.randrange(len(counts))
    if isinstance(counts, str):
        other = rng.choice(["", "o", "~", "\x00", "é", chr(rng.randrange(48, 112)), "0" * 9, "oooooooooo"])
        shape["counts"] = counts[:place] + other + counts[place + 1 :]
    elif isinstance(counts, list):
        counts[place] = rng.choice([0, -1, 10**6, 2**32 + 1, 2.0, "3", counts[place] + 1, None, [1]])
    if rng.random() < 0.2:
        shape["size"] = rng.choice([[SIDE, SIDE + 1], [SIDE], [SIDE, -SIDE], ["32", "32"], [10**9, 10**9], SIDE])
    return document


def _nest(document, rng):
    node, key = _field(document, rng)
    value = []
    for _ in range(rng.choice((3, 50, 400, 700))):
        value = [value]
    node[key] = value
    return document


MUTATIONS = {
    "key dropped": _drop, "value dropped": _drop_anywhere, "type changed": _retype, "value replaced": _replace,
    "any value replaced": _replace_anywhere, "values swapped": _swap, "record doubled": _double,
    "polygons changed": _shape, "runs changed": _runs, "nested": _nest,
}  # fmt: skip


def read_all(cfg):
    """What a training and its validation read: data sets, each sample through the pipeline, the metric."""
    train, val = check_data(cfg, ("train_dataset", "val_dataset"))
    for images in (dense.SeededImages(train, 0), dense.NamedImages(val)):
        for index in range(len(images)):
            sample = images[(0, index) if isinstance(images, dense.SeededImages) else index]
            assert sample["inputs"].numel() and len(sample["data_samples"].gt_instances.bboxes) >= 0
    metric = METRICS.build(dense.evaluator_of(cfg))
    metric.dataset_meta = val.metainfo
    # One detection in each image, so that the annotated masks are compared.
    whole = mask.encode(np.asfortranarray(np.ones((SIDE, SIDE), np.uint8)))
    results = []
    for number in [val.get_data_info(index)["img_id"] for index in range(len(val))]:
        found = {"img_id": number, "bboxes": np.array([[0.0, 0, SIDE, SIDE]]), "scores": np.array([0.9])}
        results.append(({}, {**found, "labels": np.array([0]), "masks": [dict(whole)]}))
    metric.compute_metrics(results)


def attack(folder, count):
    """Counts of outcomes of mutated files by kind, and what crashed."""
    document = valid(folder)
    text, file = json.dumps(document), folder / "coco/annotations/instances_train2017.json"
    cfg = load_config(ROOT / SCENES)
    set_data_root(cfg, str(folder / "coco"))
    cfg.val_dataset.ann_file, cfg.val_dataset.data_prefix.img = cfg.train_dataset.ann_file, "train2017/"
    cfg.val_evaluator.classwise = False
    dense.enter(cfg)
    gc.freeze()  # mmengine collects garbage for every data set, slow with all that was imported
    file.write_text(text)
    read_all(cfg)  # the valid one
    outcomes, kinds, crashes = Counter(), Counter(), []
    for seed in range(count):
        masks = seed % 4 > 0  # the others are for boxes alone
        for split in (cfg.train_dataset, cfg.val_dataset):
            for step in split.pipeline:
                step.update({key: masks for key in ("with_mask", "by_mask") if key in step})
        cfg.val_evaluator.metric = ["bbox", "segm"][: 1 + masks]
        written, names = changed(text, random.Random(seed))
        file.write_bytes(written.encode("utf-8", "surrogatepass"))
        try:
            read_all(cfg)
            outcome = "trained on"
        except UserError as error:
            outcome = "refused"
            prepared = "cannot prepare image" in str(error)
            if "\n" in str(error) or str(file) not in str(error) or prepared:
                crashes.append((seed, names, str(error)[:300]))
        except Exception as error:
            outcome = "crashed"
            crashes.append((seed, names, f"{type(error).__name__}: {error}"[:300]))
        outcomes[outcome] += 1
        kinds.update({f"{name}: {outcome}": 1 for name in set(names)})
    return outcomes, kinds, crashes


def test_some_mutated_files(tmp_path):
    outcomes, _, crashes = attack(tmp_path, 30)
    assert not crashes, crashes
    assert outcomes["refused"] > 10 and outcomes["trained on"] > 2, outcomes


@pytest.mark.faults
def test_a_thousand_mutated_files(tmp_path):
    outcomes, kinds, crashes = attack(tmp_path, 1000)
    record("coco_files", files=1000, outcomes=outcomes, kinds=dict(sorted(kinds.items())), crashes=crashes)
    assert not crashes, crashes
