"""The results table: published figures, cells of ours, what may stand beside what; every format read back."""

import json
import math
import statistics
from pathlib import Path

import pytest

from semaim.results import STATUSES, load_published
from semaim.results.formats import FORMATS
from semaim.results.table import at_a_glance, make_table

ROOT = Path(__file__).resolve().parent.parent
CATALOGUE = load_published()
WARNING = "belong to different recipes"

#: A fine-tuning of which all is recorded that a comparison needs.
WHOLE = {
    "config": "vit_base_100e.py",
    "metrics": {"top1": 84.3, "top5": 96.5, "loss": 0.7},
    "checkpoint": "work_dirs/semaim_vit_base_800e/latest.pth",
    "data": "data/imagenet",
    "train_images": 1281167,
    "val_images": 50000,
    "seed": 0,
    "epochs": 100,
    "device": "8 x NVIDIA H200",
    "date": "2026-01-02T03:04:05",
    "method": "SemAIM",
    "backbone": "ViT-B",
    "task": "fine-tuning",
    "pretrain_config": "semaim_vit_base_800e.py",
    "pretrain_epochs": 800,
    "pretrain_images": 1281167,
    "cfg_options": {},
    "commit": "0123abc",
}
#: What results.json holds of a detector that had a moment on few images.
DETECTOR = {
    "config": "semaim_mask_rcnn_scenes.py",
    "metrics": {"coco/bbox_mAP": 0.123, "coco/bbox_mAP_50": 0.3, "coco/bbox_mAP_l": -1.0, "coco/segm_mAP": 0.057},
    "checkpoint": "work_dirs/semaim_tiny/latest.pth",
    "data": "data/my_scenes/coco",
    "train_images": 500,
    "val_images": 40,
    "seed": 0,
    "iterations": 30,
    "device": "1 x CPU, 2 threads",
    "semaim": "0.1.0",
    "torch": "2.14.1",
    "date": "2026-01-02T03:04:05",
}
NEIGHBOURS = {
    "config": "vit_tiny_cifar10.py",
    "metrics": {"knn5_top1": 30.0, "knn20_top1": 33.42, "knn20_top5": 82.15},
    "checkpoint": None,
    "data": "data/50%_of|cifar<b>",
    "train_images": 50000,
    "val_images": 10000,
    "seed": 0,
    "stage": "NearestNeighbours",
}


def write(folder, content, **changes):
    """A results.json in a folder of its own; a value of None takes the key out."""
    content = {key: value for key, value in {**content, **changes}.items() if key not in changes or value is not None}
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(content))


@pytest.fixture
def works(tmp_path):
    """Three seeds of a whole fine-tuning, a small detector, and neighbours of random weights."""
    for seed, top1 in enumerate((84.3, 84.05, 84.4)):
        write(tmp_path / f"finetune/{seed}", WHOLE, seed=seed, metrics={"top1": top1, "top5": 96.5})
    write(tmp_path / "detector", DETECTOR)
    write(tmp_path / "deep/er/knn", NEIGHBOURS)
    return tmp_path


def cells(folder, **options):
    """Rows that have a cell of ours, by (task, metric)."""
    table = make_table([folder], CATALOGUE, **options)
    found = {}
    for row in table.rows:
        if row.cell:
            found.setdefault(row.section, []).append(row)
    return found


def only(folder, task="fine-tuning", metric="top-1"):
    """The one row of ours of a metric."""
    (row,) = cells(folder)[task, metric]
    return row


# --- published figures


def published(task, metric, method, backbone="ViT-B", **more):
    """Figures by what they are of."""
    asked = {"task": task, "metric": metric, "method": method, "backbone": backbone, **more}
    return [f for f in CATALOGUE.figures if all(getattr(f, name) == value for name, value in asked.items())]


def test_every_published_figure_has_source_and_status():
    assert len(CATALOGUE.figures) > 90
    for figure in CATALOGUE.figures:
        assert figure.source and figure.status in STATUSES, figure
        assert (figure.value is None) == (figure.status == "unknown"), figure
        assert figure.value is None or 0 < figure.value < 100
        assert figure.data in {dataset.name for dataset in CATALOGUE.datasets.values()}
    assert len(set(CATALOGUE.figures)) == len(CATALOGUE.figures)


def test_key_figures():
    (figure,) = published("fine-tuning", "top-1", "SemAIM", pretrain_epochs=800)
    assert (figure.value, figure.status) == (84.1, "read") and "ade770f" in figure.source
    (figure,) = published("fine-tuning", "top-1", "SemAIM", "ViT-L", pretrain_epochs=800)
    assert figure.value == 85.8
    (figure,) = published("fine-tuning", "top-1", "SemAIM*", pretrain_epochs=800)
    assert figure.value == 85.3
    for metric, ours, baseline, vitdet in (("AP box", 51.3, 50.3, 51.6), ("AP mask", 45.4, 44.9, 45.9)):
        (figure,) = published("detection", metric, "SemAIM")
        assert (figure.value, figure.status, figure.recipe, figure.pretrain_epochs) == (ours, "read", None, None)
        (figure,) = published("detection", metric, "MAE", status="derived")
        assert (figure.value, figure.recipe) == (baseline, None)
        found = published("detection", metric, "MAE", recipe="ViTDet, 100 epochs")
        assert vitdet in {figure.value for figure in found}
        assert all(WARNING in " ".join(figure.notes) for figure in found)


def test_unknown_figures_stay_blank():
    unknown = [figure for figure in CATALOGUE.figures if figure.status == "unknown"]
    found = {(f.method, f.task, f.backbone, f.pretrain_epochs) for f in unknown}
    probing = {("SemAIM", "linear probing", "ViT-B", epochs) for epochs in (400, 800)}
    assert found == probing | {("SemAIM", "segmentation", backbone, 800) for backbone in ("ViT-B", "ViT-L")}
    assert all(figure.value is None for figure in unknown)


def test_remembered_figures_are_told_apart():
    remembered = {(f.method, f.value) for f in CATALOGUE.figures if f.status == "remembered"}
    assert {("MAE", 47.2), ("BEiT", 49.8), ("supervised", 49.9), ("MoCo v3", 47.3)} <= remembered
    assert all("memory" in f.source for f in CATALOGUE.figures if f.status == "remembered")


def test_recipes_are_of_configs_we_have():
    names = {
        path.name
        for part in ("semaim/configs", "mmdet_configs", "mmseg_configs")
        for path in ROOT.glob(f"{part}/**/*.py")
    }
    assert {config for recipe in CATALOGUE.recipes for config in recipe.configs} <= names
    described = {figure.recipe for figure in CATALOGUE.figures}
    assert {recipe.name for recipe in CATALOGUE.recipes} - described == {
        "SemAIM linear probing, 90 epochs",
        "efficient probing, 90 epochs",
        "UperNet with ViT-L, 160k steps",
    }


# --- cells


def test_seeds_are_averaged_and_set_beside_the_published(works):
    row = only(works)
    values = [84.3, 84.05, 84.4]
    assert row.cell.mean == pytest.approx(statistics.mean(values))
    assert row.cell.spread == pytest.approx(statistics.stdev(values))
    assert row.published.value == 84.1 and row.difference == pytest.approx(statistics.mean(values) - 84.1)
    assert row.cell.origin["seed"] == "0, 1, 2" and row.cell.origin["commit"] == "0123abc"


def test_one_run_has_no_spread(tmp_path):
    write(tmp_path / "one", WHOLE)
    assert only(tmp_path).cell.spread is None
    assert "84.30 (n = 1)" in FORMATS["md"](make_table([tmp_path], CATALOGUE))


def test_a_seed_twice_is_not_averaged(tmp_path):
    """Two results with one seed differ in something else, or are one and the same."""
    write(tmp_path / "class_token", WHOLE, metrics={"top1": 80.0})
    write(tmp_path / "mean", WHOLE, metrics={"top1": 82.0})
    rows = cells(tmp_path)["fine-tuning", "top-1"]
    assert sorted(row.cell.mean for row in rows) == [80.0, 82.0]
    assert all(row.difference is None and "not averaged" in row.cell.remarks[-1] for row in rows)


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint": "b.pth", "method": None},
        {"epochs": 99},
        {"method": "MAE"},
        {"pretrain_epochs": 400},
        {"config": "vit_base_cls_100e.py"},
        {"train_images": 1000},
        {"val_images": 49999},
        {"data": "data/other", "train_images": 7},
        {"stage": "Classification"},
        {"precision": "bf16"},
        {"cfg_options": {"base_lr": 1e-3}},
        {"cfg_options": None},
        {"task": "linear probing"},
    ],
    ids=str,
)
def test_what_differs_by_more_than_the_seed_is_another_cell(tmp_path, change):
    write(tmp_path / "a", WHOLE)
    write(tmp_path / "b", WHOLE, seed=1, **change)
    rows = [row for (_, metric), found in cells(tmp_path).items() for row in found if metric == "top-1"]
    assert len(rows) == 2 and all(len(row.cell.runs) == 1 for row in rows)


def test_seeds_of_pretraining_are_one_cell_where_it_is_recorded(tmp_path):
    write(tmp_path / "a", WHOLE)
    write(tmp_path / "b", WHOLE, checkpoint="work_dirs/again/latest.pth", data="/elsewhere/ILSVRC")
    write(tmp_path / "c", WHOLE, seed=2, cfg_options={"num_workers": 4, "dataset.root": "/data"})
    assert len(only(tmp_path).cell.runs) == 3


def test_weights_that_are_only_a_path_are_a_cell_each(tmp_path):
    for place, path in enumerate(("mae/a.pth", "mae/b.pth", "mae/b.pth")):
        write(tmp_path / f"{place}", WHOLE, seed=place, checkpoint=path, method=None)
    assert sorted(len(row.cell.runs) for row in cells(tmp_path)["fine-tuning", "top-1"]) == [1, 2]


def test_methods_are_recorded_or_told_by_paths(tmp_path):
    paths = {
        "work_dirs/semaim_vit_base_800e/latest.pth": "SemAIM (by its path)",
        "work_dirs/semaim_clip_vit_base_800e/latest.pth": "SemAIM* (by its path)",
        "saim_vit_base_800e/latest.pth": "SAIM (by its path)",
        "/home/mae/x/mae_pretrain_vit_base.pth": "MAE (by its path)",
        "/home/mae/runs/mine/latest.pth": "unnamed (mine/latest.pth)",
        None: "random weights",
    }
    for place, path in enumerate(paths):
        write(tmp_path / f"{place}", {**WHOLE, "checkpoint": path}, method=None)
    found = {
        row.cell.runs[0].record.checkpoint: row.cell.runs[0].method for row in cells(tmp_path)["fine-tuning", "top-1"]
    }
    assert found == paths
    assert all(row.difference is None for row in cells(tmp_path)["fine-tuning", "top-1"])


def test_coco_shares_become_percent_and_what_is_not_there_is_left_out(works, tmp_path):
    assert only(works, "detection", "AP box").cell.mean == pytest.approx(12.3)
    assert only(works, "detection", "AP mask").cell.mean == pytest.approx(5.7)
    write(tmp_path / "nothing/a", DETECTOR, metrics={"coco/bbox_mAP": -1.0, "coco/segm_mAP": 0.0})
    assert set(cells(tmp_path / "nothing")) == {("detection", "AP mask")}


def test_of_the_neighbours_twenty(works, tmp_path):
    assert [key for key in cells(works) if key[0] == "k-NN"] == [("k-NN", "top-1, k = 20")]
    write(tmp_path / "few/a", NEIGHBOURS, metrics={"knn5_top1": 30.0, "knn10_top1": 31.0})
    assert set(cells(tmp_path / "few")) == {("k-NN", "top-1, k = 5"), ("k-NN", "top-1, k = 10")}
    write(tmp_path / "many/a", NEIGHBOURS, metrics={"knn200_top1": 30.0, "knn200_top5": 60.0, "knn1_top1": 31.0})
    assert set(cells(tmp_path / "many")) == {("k-NN", "top-1, k = 1"), ("k-NN", "top-1, k = 200")}


@pytest.mark.parametrize(
    "changes",
    [
        [{"pretrain_config": "semaim_vit_base_400e.py"}, {"pretrain_config": "semaim_vit_base_800e.py"}],
        [{"cfg_options": {"param_scheduler.warmup": share}} for share in (0.05, 0.2)],
        [{"pretrain_options": {"param_scheduler.warmup": share}} for share in (0.05, 0.2)],
        [{"cfg_options": {"base_lr": 0.1}, "overrides": overrides} for overrides in (None, {"base_lr": [0.2, 0.1]})],
    ],
    ids=str,
)
def test_what_differs_in_more_than_its_seed_is_not_averaged(tmp_path, changes):
    for seed, change in enumerate(changes):
        write(tmp_path / str(seed), WHOLE, seed=seed, checkpoint=f"{seed}.pth", pretrain_epochs=400, **change)
    rows = cells(tmp_path)["fine-tuning", "top-1"]
    assert [len(row.cell.runs) for row in rows] == [1, 1]


def test_other_features_are_another_metric(tmp_path):
    """The class token and the mean of the patches are two protocols: two columns, not two figures of one."""
    for name in ("class token", "mean of the patches, layer norm"):
        for method in ("SemAIM", "MAE"):
            write(tmp_path / method / name, NEIGHBOURS, method=method, features=name)
    metrics = ["top-1, k = 20", "top-1, k = 20, mean of the patches, layer norm"]
    assert [metric for _, metric in cells(tmp_path)] == metrics
    header, *lines = at_a_glance(make_table([tmp_path], CATALOGUE))
    assert [column.split(": ")[1] for column in header[-2:]] == metrics
    assert all(figure == "33.42" for line in lines for figure in line[-2:])


def test_a_diverged_run_is_shown(tmp_path):
    for seed, value in enumerate((math.nan, 70.0)):
        write(tmp_path / str(seed), WHOLE, seed=seed, metrics={"top1": value})
    assert math.isnan(only(tmp_path).cell.mean) and math.isnan(only(tmp_path).cell.spread)
    for render in FORMATS.values():
        assert "nan" in render(make_table([tmp_path], CATALOGUE))


#: Scales of a multi-scale test.
SIX = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
