"""Labels that pass every check of ranges and train nonsense: each kind is found, by the table of docs/labels.md."""

import re
import shutil
import tarfile
from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import check_data, describe_data, one_line, tool
from PIL import Image

pytest.importorskip("mmseg", reason="mmsegmentation is not installed: runs after tools/setup.sh --extras all")

from semaim.data.convert import CAMVID  # noqa: E402
from semaim.data.label_rules import trained_as  # noqa: E402
from semaim.engine import dense  # noqa: E402
from semaim.engine.config import load_config, set_data_root  # noqa: E402
from semaim.errors import UserError  # noqa: E402

# Of mmseg, of what the cases give on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:Default ``avg_non_ignore``", "ignore:`reduce_zero_label` will")
ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "mmseg_configs/semaim_upernet_camvid.py"
SPLITS = {"train_dataset": "training", "val_dataset": "validation"}


def stripes(*values, first=None):
    """A map of 10 x 10 pixels with equal shares of each value; `first` pixels of the first of them."""
    flat = np.resize(np.repeat(np.array(values), 100 // len(values)), 100)
    if first is not None:
        flat = np.concatenate([np.full(first, values[0]), np.resize(np.array(values[1:]), 100 - first)])
    return flat.reshape(10, 10).astype(np.uint8)


def write(root, maps, split):
    """Maps, each with a black image, in ADE20K's folders."""
    for kind in ("images", "annotations"):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
    for number, values in enumerate(maps):
        Image.fromarray(values.astype(np.uint8)).save(root / f"annotations/{split}/{number}.png")
        Image.new("RGB", values.shape[::-1]).save(root / f"images/{split}/{number}.jpg")


ABC = ("a", "b", "c")
GOOD = [stripes(1, 2, 3), stripes(0, 1, 2, 3)]
FROM_ZERO = [stripes(0, 1, 2), stripes(0, 1)]
TWO = {"classes": ("back", "front"), "reduce_zero_label": False}
ONE_CHANNEL = {"decode_head": {"out_channels": 1, "loss_decode": {"type": "CrossEntropyLoss"}}}


def train_only(classes):
    return lambda cfg: cfg.train_dataset.metainfo.update(classes=classes)


def ignore_254(cfg):
    for part in (cfg.model.decode_head, cfg.model.auxiliary_head, cfg.val_evaluator):
        part.ignore_index = 254


#: Row of docs/labels.md -> (training maps, validation maps, changes, words of the message). Changes are classes,
#: reduce_zero_label, most_ignored, those of the heads, or a function of the config.
CASES = {
    "fewer than two classes": [
        ([stripes(0, 1)], GOOD, {"classes": ("only",)}, "has 1 class: .* mIoU is 100 whatever is learned")
    ],
    "head of another number of classes": [
        (GOOD, GOOD, {"decode_head": {"num_classes": 4}}, r"model.decode_head.num_classes is 4, .* set it to 3"),
        (GOOD, GOOD, {"auxiliary_head": {"num_classes": 2}}, "model.auxiliary_head.num_classes is 2"),
        (GOOD, GOOD, {"decode_head": {"num_classes": 1}}, "num_classes is 1, .* set it to 3"),
    ],
    "softmax over one channel": [(FROM_ZERO, FROM_ZERO, {**TWO, **ONE_CHANNEL}, "use_sigmoid=True")],
    "ignore_index of head and metric differ": [
        (GOOD, GOOD, {"decode_head": {"ignore_index": 0}}, "decode_head.ignore_index is 0, val_evaluator's is 255")
    ],
    "padding is not ignored": [
        (GOOD, GOOD, ignore_254, "decode_head.ignore_index is 254, what pads label maps is 255")
    ],
    "label_map that is not read": [
        (GOOD, GOOD, lambda cfg: cfg.train_dataset.metainfo.update(label_map={255: 1}), "mmseg makes its own")
    ],
    "reduce_zero_label twice": [
        (GOOD, GOOD, lambda cfg: cfg.train_dataset.pipeline[1].update(reduce_zero_label=False), "LoadAnnotations .*Fa")
    ],
    "classes differ": [(GOOD, GOOD, train_only(("a", "c", "b")), "train_dataset and val_dataset have other")],
    "value beyond the classes": [
        ([stripes(1, 2, 4)], GOOD, {}, "0.png holds the value 4; of 3 classes, .*=True, the largest is 3"),
        (FROM_ZERO, [stripes(0, 3)], {"reduce_zero_label": False}, r"is 2 \(values reach 3: .* count from 1"),
    ],
    "nothing labelled at all": [
        ([stripes(255), stripes(255)], GOOD, {}, "train_dataset are ignored, its maps hold 255 "),
        (GOOD, [stripes(0)], {}, "val_dataset are ignored, its maps hold 0 with reduce_zero_label=True"),
        ([stripes(0, 255)], GOOD, {"classes": TWO["classes"]}, "write 1 in place of 255 .*set reduce_zero_label=False"),
    ],
    "one class only": [
        ([stripes(0, 255)] * 2, FROM_ZERO, TWO, "the class 0 back: write 1 in place of 255 .* MAPS OUT 255=1"),
        ([stripes(0, 2), stripes(2)], GOOD, {}, "of train_dataset are of the class 2 b: nothing is learned"),
        (GOOD, [stripes(1)], {}, "of val_dataset are of the class 1 a: to predict it everywhere gives an mIoU of 100"),
    ],
    "counted from 0, it seems": [
        (FROM_ZERO, FROM_ZERO, {}, "value from 0 to 2 and never 3, .* if 0 .* 3 c just absent, .*most_ignored=0.42")
    ],
    "more ignored than the config expects": [
        (GOOD, GOOD, {"most_ignored": 0.1}, r"12\.\d% of the pixels of train_dataset .*value 0: 12\.\d%.* is 10.0%")
    ],
    "classes that never occur": [
        ([stripes(1, 3)], [stripes(1, 3)], {}, "1 of 3 never occur in train_dataset: 2 b"),
        (GOOD, [stripes(1, 3)], {}, "1 of 3 never occur in val_dataset, so that mIoU leaves them out"),
    ],
    "validated on, but never trained": [([stripes(1, 3)], GOOD, {}, "val_dataset has 2 b, train_dataset has not")],
    "nothing labelled": [([*GOOD, stripes(0)], GOOD, {}, "1 of 3 maps of train_dataset: .*2.png")],
    "most is ignored": [([stripes(0, 1, 2, 3, first=60)], GOOD, {}, "60.0% of the pixels of train_dataset")],
    "reduce_zero_label looks wrong": [
        ([stripes(0, 1, 3), stripes(2, 3)], [stripes(0, 1, 2)], {}, "val_dataset: it is on, but the largest value is"),
        (FROM_ZERO, FROM_ZERO, {"most_ignored": 0.42}, "train_dataset: it is on, but the largest value is 2 and 0 occ"),
        ([stripes(1, 2)], [stripes(0, 1, 2)], {"reduce_zero_label": False}, "train_dataset: it is off, but 0 never"),
    ],
}  # fmt: skip


def table():
    """The rows of docs/labels.md: finding -> weight."""
    rows = re.findall(r"^\| (.+?) \| (error|warning) \|", (ROOT / "docs/labels.md").read_text(), re.MULTILINE)
    return dict(rows)


@cache
def read_config():
    """CamVid's config."""
    return load_config(CONFIG)


def config(root):
    """A copy of it, of the data in a folder."""
    cfg = deepcopy(read_config())
    set_data_root(cfg, str(root))
    dense.enter(cfg)
    return cfg


def lines_of(root, train, val, changes):
    """What a training's log would say; `UserError` where it must not start."""
    write(root, train, "training")
    write(root, val, "validation")
    cfg = config(root)
    change = changes if callable(changes) else None
    given = {} if change else changes
    classes = given.get("classes", ABC)
    for split in SPLITS:
        cfg[split].metainfo = {"classes": classes, "palette": [[0, 0, 0]] * len(classes)}
        cfg[split].reduce_zero_label = given.get("reduce_zero_label", True)
    cfg.most_ignored = given.get("most_ignored")
    for head in ("decode_head", "auxiliary_head"):
        cfg.model[head].update({"num_classes": len(classes), **given.get(head, {})})
    if change:
        change(cfg)
    return describe_data(cfg, dict(zip(SPLITS, check_data(cfg, tuple(SPLITS)), strict=True)))


def test_the_table_of_the_documentation_is_the_list():
    assert len(table()) == 18 and list(table()) == list(CASES)


@pytest.mark.parametrize("row, case", [(row, case) for row, cases in CASES.items() for case in cases])
def test_each_row_of_the_table_occurs(tmp_path, row, case):
    train, val, changes, words = case
    if table()[row] == "error":
        with pytest.raises(UserError, match=f"{row}.*{words}") as error:
            lines_of(tmp_path, train, val, changes)
        assert "\n" not in str(error.value)
        return
    found = [line for line in lines_of(tmp_path, train, val, changes) if line.startswith(f"warning: {row}: ")]
    assert any(re.search(words, line) for line in found), found


def test_good_labels_are_described_and_nothing_is_said_against_them(tmp_path):
    first, second = lines_of(tmp_path, GOOD, GOOD, {})
    head, values = first.split("\n")
    assert head.startswith("labels of train_dataset: 2 maps, 12.50% of the pixels ignored; 3 of 3 classes occur")
    # Three stripes of 33 pixels and one more of the first, four of 25: 1 has 34 + 25 of 200.
    assert values == "  0 ignored 12.50% in 1, 1 a 29.50% in 2, 2 b 29.00% in 2, 3 c 29.00% in 2"
    assert second.startswith("labels of val_dataset")


def test_a_part_of_the_classes_is_looked_at_too(tmp_path):
    """mmseg makes a label map of it; a value beyond the data set's own classes ended in an IndexError."""
    cfg = load_config(ROOT / "mmseg_configs/semaim_upernet.py")
    set_data_root(cfg, str(tmp_path))
    write(tmp_path, [stripes(0, 1, 3, 7, 150)], "training")
    write(tmp_path, [stripes(1, 3)], "validation")
    dense.enter(cfg)
    for split in SPLITS:
        cfg[split].metainfo = {"classes": ("sky", "wall")}
    for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
        head.num_classes = 2
    sets = dict(zip(SPLITS, check_data(cfg, tuple(SPLITS)), strict=True))
    text = "\n".join(describe_data(cfg, sets))
    assert "0 ignored 20.00% in 1, 1 wall 20.00% in 1, 3 sky 20.00% in 1, 7 ignored" in text
    assert "2 of 2 classes occur" in text
    shutil.copytree(tmp_path / "images", tmp_path / "more/images")
    write(tmp_path / "more", [stripes(1, 3, 151)], "training")
    set_data_root(cfg, str(tmp_path / "more"))
    with pytest.raises(UserError, match="holds the value 151; of 2 classes"):
        check_data(cfg, tuple(SPLITS))


@pytest.mark.parametrize("reduce_zero_label", [False, True])
@pytest.mark.parametrize("label_map", [None, {0: 1, 1: 0, 5: 255, 7: 6}, {255: 1}, {0: 1, 1: 2, 2: 3, 254: 0}])
def test_what_a_value_trains_is_what_mmseg_makes_of_it(tmp_path, reduce_zero_label, label_map):
    from mmseg.datasets.transforms import LoadAnnotations  # after our part, which it needs

    path = tmp_path / "all.png"
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(path)
    info = {"seg_map_path": str(path), "reduce_zero_label": reduce_zero_label, "label_map": label_map, "seg_fields": []}
    theirs = LoadAnnotations().transform(info)["gt_seg_map"].ravel().tolist()
    ours = trained_as(reduce_zero_label, label_map)
    assert [255 if number is None else number for number in ours] == theirs


# CamVid


def camvid(root, splits=("train", "val"), shift=0):
    """Streets with CamVid's own numbers and about its shares, in its own folders; `shift` is added to the numbers."""
    shares = {0: 17, 1: 23, 2: 1, 3: 31, 4: 5, 5: 10, 6: 1, 7: 1, 8: 5, 9: 1, 10: 1, 11: 4}
    values = np.repeat([(value + shift) % 12 for value in shares], list(shares.values())).reshape(10, 10)
    for split in splits:
        for folder, pixels in ((split, np.arange(300).reshape(10, 10, 3) % 256), (f"{split}annot", values)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            for number in range(2):
                Image.fromarray(pixels.astype(np.uint8)).save(root / folder / f"{number}.png")
    return shares


def test_camvid_is_converted_and_its_own_numbers_do_not_start(tmp_path):
    shares = camvid(tmp_path / "own", ("train", "val", "test"))
    out = tmp_path / "camvid"
    done = tool("convert_labels.py", "camvid", tmp_path / "own", out)
    assert done.returncode == 0, done.stderr
    assert "0 ignored 4.00% in 2, 1 sky 17.00% in 2" in done.stdout and "11 bicyclist 1.00% in 2" in done.stdout
    assert (out / "classes.txt").read_text().split() == CAMVID == list(read_config().train_dataset.metainfo.classes)
    for split in ("training", "validation", "test"):
        values = np.asarray(Image.open(out / "annotations" / split / "0.png"))
        expected = {(value + 1) % 12: share for value, share in shares.items()}  # void 0, sky 1, ..., bicyclist 11
        assert dict(zip(*np.unique(values, return_counts=True), strict=True)) == expected
        image = np.asarray(Image.open(out / "images" / split / "0.jpg").convert("RGB"), int)
        assert abs(image - np.arange(300).reshape(10, 10, 3) % 256).mean() < 20
    one_line(tool("convert_labels.py", "camvid", tmp_path / "own", out), "is not empty")
    camvid(tmp_path / "shifted", shift=1)
    one_line(tool("convert_labels.py", "camvid", tmp_path / "shifted", tmp_path / "x"), "do these count from 1")
    one_line(tool("convert_labels.py", "camvid", out, tmp_path / "x"), "is not CamVid's own layout")

    # The same folders as they are, put where the config looks: every value is in range, and every class wrong.
    for split, name in (("train", "training"), ("val", "validation")):
        write(
            tmp_path / "wrong", [np.asarray(Image.open(tmp_path / f"own/{split}annot/{n}.png")) for n in (0, 1)], name
        )
    arguments = ["mmseg_configs/semaim_upernet_camvid.py", "--work-dir", tmp_path / "run", "--data-root"]
    done = tool("train.py", *arguments, tmp_path / "wrong")
    one_line(
        done, "more ignored than the config expects: 17.0% of the pixels of train_dataset are ignored (value 0: 17.0%)"
    )
    assert len(check_data(config(out), tuple(SPLITS))) == 2


def test_the_real_camvid_passes_and_its_own_numbers_do_not(shared, tmp_path):
    """The shares of void and sky, between which the config's `most_ignored` stands, on every 25th map."""
    maps: dict[str, list] = {name: [] for name in SPLITS.values()}
    with tarfile.open(shared / "data/camvid.tar") as archive:
        files = [file for file in archive if file.name.endswith(".png")]
        for split, found in maps.items():
            for file in [file for file in files if f"/{split}/" in file.name][::25]:
                found.append(np.asarray(Image.open(archive.extractfile(file))))
    for own in (False, True):
        for split, found in maps.items():
            write(tmp_path / str(own), [(values.astype(int) - own) % 12 for values in found], split)
        cfg = config(tmp_path / str(own))
        for split in SPLITS:
            if own:
                with pytest.raises(UserError, match="more ignored than the config expects"):
                    check_data(cfg, (split,))
            else:
                check_data(cfg, (split,))


# Masks


def test_masks_of_0_and_255_are_mended_by_the_tool(tmp_path):
    write(tmp_path / "data", [stripes(0, 255), stripes(255)], "training")
    write(tmp_path / "data", [stripes(0, 255)], "validation")
    maps, out = tmp_path / "data/annotations", tmp_path / "annotations"
    done = tool("convert_labels.py", "values", maps, out, "255=1")
    assert done.returncode == 0 and "3 label maps written" in done.stdout and "255 is now 1 in 3" in done.stdout
    for path in maps.rglob("*.png"):
        mended = np.asarray(Image.open(out / path.relative_to(maps)))
        assert mended.dtype == np.uint8 and (mended == (np.asarray(Image.open(path)) == 255)).all()
    for arguments, words in (
        ([maps, tmp_path / "x", "7=1"], "no label map in .* holds the value 7"),
        ([maps, tmp_path / "x", "255=300"], "300 is not a value"),
        ([maps, tmp_path / "x", "255"], "give OLD=NEW"),
        ([tmp_path / "none", tmp_path / "x", "255=1"], "no PNG files"),
        ([maps, out, "255=1"], "is not empty"),
    ):
        done = tool("convert_labels.py", "values", *arguments)
        assert done.returncode == 2 and re.search(words, done.stderr) and not (tmp_path / "x").exists(), done.stderr


# The metric


def test_the_metric_is_mmsegs_and_says_over_how_many_classes():
    from semaim.segmentation.metrics import CountedIoUMetric, IoUMetric

    labels = torch.tensor([[0, 0, 1, 255]])
    for predicted, counted, expected in (
        ([[0, 0, 1, 3]], 2, 100.0),  # 3 is predicted where nothing is labelled: neither c nor d has an IoU
        ([[0, 2, 1, 0]], 3, 50.0),  # 1/2, 1/1 and, of a class that is in no label, 0
        ([[0, 0, 0, 0]], 2, 33.33),  # 2/3 and 0
    ):
        figures = []
        for metric in (IoUMetric(), CountedIoUMetric()):
            metric.dataset_meta = {"classes": ("a", "b", "c", "d")}
            metric.process({}, [{"pred_sem_seg": {"data": torch.tensor(predicted)}, "gt_sem_seg": {"data": labels}}])
            figures.append(metric.evaluate(1))
        assert figures[0] == figures[1] and figures[0]["mIoU"] == pytest.approx(expected, abs=0.01)
        assert metric.counted == (counted, 4)
