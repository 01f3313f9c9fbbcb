"""What of ours may stand beside what is published: every figure reached, or a reason that is true."""

import dataclasses
import json

import pytest
from test_results import CATALOGUE, SIX, WHOLE, cells, only, published, write

from semaim.engine.config import load_config
from semaim.engine.results import backbone_of, prepared_images, title_of
from semaim.places import own_configs
from semaim.registry import task_of, tasks
from semaim.results.comparing import compare, unusable, way
from semaim.results.formats import FORMATS
from semaim.results.table import make_table

NAMED = {name.rpartition("/")[2]: name for name in own_configs()}


def key_of(figure):
    """The metric's key in results.json, and the number there for the published figure."""
    label = figure.metric.partition(", ")[0]
    (found,) = [
        (key, figure.value / metric.factor)
        for task in tasks()
        if task.title == figure.task
        for key, metric in task.metrics.items()
        if metric.label == label
    ]
    return found


def synthetic(figure, **changes):
    """The results.json of a run at exactly a published figure, by the config and weights that `way` names."""
    config, weights = way(figure, CATALOGUE)
    recipe, data = CATALOGUE.recipe_of(config, figure.task), CATALOGUE.datasets[figure.task]
    known = CATALOGUE.pretrainings.get(weights) or CATALOGUE.released[weights.removeprefix("timm:")]
    content = {key: value for key, value in WHOLE.items() if key != "epochs"} | {
        "config": config,
        "metrics": dict([key_of(figure)]),
        "train_images": data.train_images[0],
        "val_images": data.val_images,
        "task": figure.task,
        "backbone": known.backbone,
    }
    length = ("iterations", recipe.iterations) if recipe.iterations else ("epochs", recipe.epochs)
    content |= dict([length])
    if weights.startswith("timm:"):  # as a run records it: only a name
        content |= {"checkpoint": weights, "method": weights.removeprefix("timm:"), "backbone": "vit"}
        content |= {"pretrain_config": None, "pretrain_epochs": None, "pretrain_images": None}
    else:
        content |= {"method": known.method, "pretrain_epochs": known.pretrain_epochs, "pretrain_config": weights}
    if figure.scales != (1.0,):
        content |= {"stage": "test, several scales and flipped", "scales": list(figure.scales)}
    return content | changes


def row_of(folder, figure):
    """The row of a published figure."""
    (row,) = [row for row in make_table([folder], CATALOGUE).rows if row.published is figure]
    return row


REACHED = [f for f in CATALOGUE.figures if way(f, CATALOGUE)[0] and not f.over]
IDS = [f"{f.method}-{f.backbone}-{f.metric}-{f.value}" for f in REACHED]


@pytest.mark.parametrize("figure", REACHED, ids=IDS)
def test_a_run_at_a_published_figure_has_no_difference(tmp_path, figure):
    write(tmp_path / "a", synthetic(figure))
    row = row_of(tmp_path, figure)
    assert row.cell is not None and row.difference == pytest.approx(0, abs=1e-9)
    not_stated = [name for name in ("pretrain_epochs", "recipe") if getattr(figure, name) is None]
    (words,) = [remark for remark in row.remarks if "does not state" in remark] or [""]
    assert ("recipe" in words) == (
        "recipe" in not_stated or figure.recipe not in {recipe.name for recipe in CATALOGUE.recipes}
    )
    assert ("pretraining epochs" in words) == ("pretrain_epochs" in not_stated)


def test_the_papers_claim_and_its_neighbours_are_all_reached():
    """The figures that the suite is for."""
    wanted = {
        ("fine-tuning", "SemAIM", "ViT-B", 84.1),
        ("fine-tuning", "SemAIM*", "ViT-B", 85.3),
        ("fine-tuning", "SemAIM", "ViT-L", 85.8),
        ("fine-tuning", "MAE", "ViT-B", 83.6),
        ("fine-tuning", "MAE", "ViT-L", 85.9),
        ("linear probing", "MAE", "ViT-B", 67.8),
        ("detection", "SemAIM", "ViT-B", 51.3),
        ("detection", "SemAIM", "ViT-B", 45.4),
        ("detection", "MAE", "ViT-B", 51.6),
        ("detection", "MAE", "ViT-B", 45.9),
        ("detection", "MAE", "ViT-B", 50.3),
        ("segmentation", "MAE", "ViT-B", 48.13),
    }
    assert wanted <= {(f.task, f.method, f.backbone, f.value) for f in REACHED}
    configs = {f.recipe: way(f, CATALOGUE)[0] for f in REACHED if f.value == 50.3}
    assert configs["Li et al. 2021, 100 epochs"] == "semaim_mask_rcnn_li2021.py"  # the older recipe


@pytest.mark.parametrize("figure", [f for f in CATALOGUE.figures if f not in REACHED], ids=str)
def test_every_other_figure_says_why_not(tmp_path, figure):
    """By the field that no config or weights of ours have; or it is a gain."""
    key, number = key_of(dataclasses.replace(figure, value=50.0))
    write(tmp_path / "a", WHOLE, task=figure.task, config="other.py", metrics={key: number})
    (words,) = row_of(tmp_path, figure).remarks
    config, why = way(figure, CATALOGUE)
    if figure.over:
        assert words.endswith(f"--against {figure.over}") and config and why in CATALOGUE.pretrainings
        return
    assert words == f"not comparable: {why}"
    recipes = {name for recipe in CATALOGUE.recipes for name in (recipe.name, *recipe.states)}
    weights = [*CATALOGUE.pretrainings.values(), *CATALOGUE.released.values()]
    if "recipe" in why:
        backbones = {b for r in CATALOGUE.recipes if r.name == figure.recipe for b in r.configs.values()}
        assert figure.recipe not in recipes or not backbones & {figure.backbone, None}
    elif "weights" in why:
        same = [w for w in weights if (w.method, w.backbone) == (figure.method, figure.backbone)]
        assert all(w.pretrain_epochs != figure.pretrain_epochs for w in same)
    else:
        assert why == unusable(figure) and (figure.value is None or figure.value_to or figure.status == "remembered")


CHANGED = [
    ({"method": "MAE", "pretrain_config": "mae_vit_base_800e.py"}, "pretraining epochs 800, published 1600"),
    ({"method": "MySemAIM"}, "method MySemAIM: nothing published of it"),
    ({"backbone": "ViT-H"}, "backbone ViT-H: published of SemAIM are ViT-B, ViT-L"),
    ({"pretrain_epochs": 500, "pretrain_config": "of_500e.py"}, "pretraining epochs 500, published"),
    (
        {"config": "vit_base_100e_mae.py"},
        "recipe MAE fine-tuning, 100 epochs, published SemAIM fine-tuning, 100 epochs",
    ),
    ({"config": "mine.py"}, "its config follows no published recipe"),
    ({"config": "mine/vit_base_100e.py"}, "changed: config mine/vit_base_100e.py"),
    ({"epochs": 99}, "reduced: 1,281,167 images, 99 epochs"),
    ({"train_images": 1000}, "reduced: 1,000 images, 100 epochs"),
    ({"val_images": 10000}, "validated on 10,000"),
    ({"pretrain_images": 1000}, "pretrained on 1,000 images"),
    ({"cfg_options": {"model.mixup": 0.5}}, "changed: model.mixup=0.5"),
    ({"pretrain_options": {"base_lr": 1}}, "changed: pretraining's base_lr=1"),
    ({"partly_loaded": "without 2 tensors"}, "partly loaded: without 2 tensors"),
    ({"cfg_options": None}, "not recorded: cfg options"),
    ({"images": {"size": 224, "crop_pct": 0.9}}, "unlike its recipe: images of crop_pct 0.9 (0.875)"),
    (
        {"images": {"size": 384, "crop_pct": 0.875, "crop_mode": "squash"}},
        "unlike its recipe: images of size 384 (224), images of crop_mode squash (center)",
    ),
]


@pytest.mark.parametrize(("change", "why"), CHANGED, ids=str)
def test_one_changed_field_is_named(tmp_path, change, why):
    (figure,) = published("fine-tuning", "top-1", "SemAIM", pretrain_epochs=800)
    write(tmp_path / "a", synthetic(figure, metrics={"top1": 84.1}), **change)
    row = only(tmp_path)
    assert row.published is None and why in "; ".join(row.remarks)
    assert row_of(tmp_path, figure).difference is None


@pytest.mark.parametrize(
    ("scales", "beside", "why"),
    [
        (None, {48.1, 48.13}, ""),
        (SIX, {48.70}, ""),
        ([1.0, 1.25, 1.5], set(), "metric mIoU, 3 scales and flipped: published are mIoU, "),
    ],
)
def test_several_scales_are_a_metric_of_their_own(tmp_path, scales, beside, why):
    (figure,) = published("segmentation", "mIoU", "MAE", value=48.13)
    several = {"scales": scales, "stage": "test, several scales and flipped"} if scales else {}
    write(tmp_path / "a", synthetic(figure, **several))
    ((_, rows),) = cells(tmp_path).items()
    assert {row.published.value for row in rows if row.published} == beside
    assert all(why in "; ".join(row.remarks) for row in rows)
    write(tmp_path / "b", synthetic(figure, **several, classes=150, classes_evaluated=149, seed=1))
    (row,) = [row for _, rows in cells(tmp_path / "b").items() for row in rows]
    assert row.published is None and row.remarks == ("mean over 149 of 150 classes",)


def test_unknown_scales_of_ours_are_no_known_ones(tmp_path):
    (figure,) = published("segmentation", "mIoU, 6 scales and flipped", "MAE")
    write(tmp_path / "a", synthetic(figure, scales=None))
    ((_, (row,)),) = cells(tmp_path).items()
    assert row.published is None and "several scales" in row.remarks[0]


@pytest.mark.parametrize(
    "change", [{"status": "remembered"}, {"value_to": 84.2}, {"value": None, "status": "unknown"}], ids=str
)
def test_nothing_is_compared_with_what_is_not_known(tmp_path, change):
    (figure,) = published("fine-tuning", "top-1", "SemAIM", pretrain_epochs=800)
    write(tmp_path / "a", synthetic(figure))
    uncertain = dataclasses.replace(figure, **change)
    others = [f for f in CATALOGUE.figures if f.task != "fine-tuning"]
    rows = make_table([tmp_path], dataclasses.replace(CATALOGUE, figures=[uncertain, *others])).rows
    assert all(row.difference is None for row in rows)
    (ours,) = [row for row in rows if row.cell and row.section[1] == "top-1"]
    assert ours.remarks == (f"the published figure: {unusable(uncertain)}",)


def test_what_a_source_does_not_state_neither_matches_nor_forbids(tmp_path):
    """SemAIM's AP is from the abstract: neither recipe nor epochs, so both of our recipes stand beside it."""
    (figure,) = published("detection", "AP box", "SemAIM")
    for config in ("semaim_mask_rcnn.py", "semaim_mask_rcnn_li2021.py"):
        write(tmp_path / config, synthetic(figure, config=config, metrics={"coco/bbox_mAP": 0.513}))
    rows = [row for row in make_table([tmp_path], CATALOGUE).rows if row.published is figure]
    assert len(rows) == 2 and all(row.difference == pytest.approx(0) for row in rows)
    assert {row.remarks for row in rows} == {("the source does not state: pretraining epochs, recipe",)}
    text = FORMATS["md"](make_table([tmp_path], CATALOGUE))
    assert text.count("the source does not state: pretraining epochs, recipe; note 1") == 2


def test_fields_are_compared_one_by_one(tmp_path):
    (figure,) = published("fine-tuning", "top-1", "SemAIM", pretrain_epochs=800)
    write(tmp_path / "a", synthetic(figure))
    run = only(tmp_path).cell.runs[0]
    for name, words in (("method", "method SemAIM, published X"), ("backbone", "backbone ViT-B, published X")):
        assert compare(run, dataclasses.replace(figure, **{name: "X"})).differs == (words,)
        assert compare(run, dataclasses.replace(figure, **{name: None})).unstated == (name,)
    assert compare(run, figure).allowed and not compare(run, figure).unstated
    unknown = dataclasses.replace(run, backbone=None)
    assert compare(unknown, figure).differs == ("backbone not recorded, published ViT-B",)


@pytest.mark.parametrize("name", CATALOGUE.pretrainings)
def test_pretrainings_are_what_the_catalogue_says(name):
    cfg = load_config(NAMED[name], check=False)
    known = CATALOGUE.pretrainings[name]
    described = (title_of(cfg.model), backbone_of(cfg), cfg.train_cfg.max_epochs)
    assert described == (known.method, known.backbone, known.pretrain_epochs)


def test_recipes_lengths_are_their_configs():
    for recipe in CATALOGUE.recipes:
        task = next(task for task in tasks() if task.title == recipe.task)
        for name in recipe.configs:
            files = [load_config(path, check=False) for path in own_configs().values() if path.name == name]
            (cfg,) = [cfg for cfg in files if type(task_of(cfg)) is task]
            length = (cfg.train_cfg.get("max_epochs"), cfg.train_cfg.get("max_iters"))
            assert length == (recipe.epochs, recipe.iterations), name
            own = recipe.configs[name] is not None
            assert not own or prepared_images(cfg) == (recipe.images or {})  # others take their encoder's
            if backbone := cfg.model.get("backbone"):
                relative = backbone.get("rel_pos") or backbone.get("rel_bias")
                assert recipe.unlike.get(name) == (None if relative else "no relative positions"), name


def test_a_config_that_is_unlike_its_recipe_says_so(tmp_path):
    """Any encoder's detectors and segmentors have no relative positions; images may be the recipe's own."""
    figure = next(f for f in published("segmentation", "mIoU", "MAE") if f.value == 48.13)
    write(tmp_path / "a", synthetic(figure, metrics={"mIoU": 48.13}, config="plain_upernet.py"))
    row = only(tmp_path, "segmentation", "mIoU")
    assert row.difference is None and "unlike its recipe: no relative positions" in row.remarks
    (figure,) = published("fine-tuning", "top-1", "SemAIM", pretrain_epochs=800)
    for name, more in (("b", {}), ("c", {"interpolation": "bicubic"})):
        images = {"size": 224, "crop_pct": 0.875, **more}
        write(tmp_path / name, synthetic(figure, metrics={"top1": 84.1}, images=images))
        assert only(tmp_path / name).difference == 0.0


def test_configs_of_one_recipe_train_alike():
    """Of one task and backbone size, or of any encoder: optimizer, batch, rate, schedule and augmentation."""
    for recipe in CATALOGUE.recipes:
        task = next(task for task in tasks() if task.title == recipe.task)
        seen = {}
        for name, backbone in recipe.configs.items():
            files = [load_config(path, check=False) for path in own_configs().values() if path.name == name]
            (cfg,) = [cfg for cfg in files if type(task_of(cfg)) is task]
            if backbone in (None, "ViT-B"):
                seen[name] = (
                    *(cfg.optim_wrapper.optimizer.type, cfg.total_batch_size, cfg.base_lr, cfg.param_scheduler),
                    (cfg.get("dataset") or {}).get("augment"),
                )
        assert all(one == next(iter(seen.values())) for one in seen.values()), recipe.name


@pytest.mark.parametrize(
    ("source", "known"),
    [
        ("timm:vit_base_patch16_224.mae", True),
        ("hf-hub:timm/vit_base_patch16_224.mae", True),
        ("hf-hub:me/vit_base_patch16_224.mae", False),
        ("local-dir:/x/vit_base_patch16_224.mae", False),
        ("timm:vit_base_patch16_224.dino", False),
        ("work/vit_base_patch16_224.mae", False),
    ],
)
def test_released_weights_are_known_by_their_public_name_alone(tmp_path, source, known):
    (figure,) = published("fine-tuning", "top-1", "MAE", recipe="MAE fine-tuning, 100 epochs")
    content = synthetic(figure, checkpoint=source, method=None, backbone="vit_base_patch16_224")
    content |= {"pretrain_config": None, "pretrain_epochs": None, "pretrain_images": None}
    write(tmp_path / "a", {key: value for key, value in content.items() if value is not None})
    row = row_of(tmp_path, figure)
    assert (row.difference is not None) == known
    if not known:
        assert "not recorded" in "; ".join(only(tmp_path).remarks)
        assert json.loads((tmp_path / "a/results.json").read_text())["checkpoint"] == source
