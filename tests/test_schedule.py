"""Learning rates, batch arithmetic, optimizer groups."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from schedules import rates, walked
from torch import nn

from semaim.engine.config import CONFIGS, load_config
from semaim.engine.optim import group_parameters
from semaim.engine.schedule import (
    CosineWithWarmup,
    PolyWithWarmup,
    StepsWithWarmup,
    cosine_with_warmup,
    describe,
    plan_batch,
)
from semaim.errors import UserError
from semaim.models import VisionTransformer


def test_schedule_of_the_reference(shared):
    recorded = json.loads((shared / "golden/semaim/ema.json").read_text())["scalars"]["lr_schedule"]
    cfg = recorded["config"]
    for epoch, lr in zip(recorded["epoch"], recorded["lr"], strict=True):
        ours = cfg["lr"] * cosine_with_warmup(epoch, cfg["epochs"], cfg["warmup_epochs"], cfg["min_lr"] / cfg["lr"])
        assert ours == pytest.approx(lr, rel=1e-12, abs=1e-15)


def scheduler(accumulation=1, kind=CosineWithWarmup, warmup=0.25, **options):
    """Of a run of 24 iterations."""
    parameter = nn.Parameter(torch.zeros(1))
    groups = [{"params": [parameter], "lr": 2.0}, {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.5}]
    optimizer = torch.optim.SGD(groups)
    run = {"steps": 24 // accumulation, "accumulation": accumulation, "peak_lr": 2.0}
    return optimizer, kind(optimizer, warmup=warmup, **run, **options)


def test_scheduler_scales_every_group_and_keeps_the_rate_within_a_step():
    optimizer, schedule = scheduler(accumulation=3, min_lr=0.2)
    rates = []
    for _ in range(24):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    expected = [cosine_with_warmup(i // 3 * 3 / 6, 4, 1, 0.1) for i in range(24)]
    assert rates == [[pytest.approx(2.0 * share), pytest.approx(0.5 * share)] for share in expected]


@pytest.mark.parametrize("iteration", [1, 5, 6, 17, 23])
@pytest.mark.parametrize("kind", [CosineWithWarmup, PolyWithWarmup, StepsWithWarmup])
def test_seek_is_as_if_the_steps_had_been_made(kind, iteration):
    more = {"milestones": (0.5, 0.8)} if kind is StepsWithWarmup else {"min_lr": 0.01}
    optimizer, schedule = scheduler(end=24, kind=kind, start_factor=0.1, **more)
    for _ in range(iteration):
        optimizer.step()
        schedule.step()
    sought_optimizer, sought = scheduler(end=24, kind=kind, start_factor=0.1, **more)
    sought_optimizer.step()
    sought.seek(iteration)
    for _ in range(24 - iteration):
        assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in sought_optimizer.param_groups]
        for o, s in ((optimizer, schedule), (sought_optimizer, sought)):
            o.step()
            s.step()


def test_what_is_no_share_of_the_run_is_an_error():
    for warmup in (1, 1.0, 40, -0.1, "0.1", True):
        with pytest.raises(UserError, match="param_scheduler.warmup is .*: give a share of the run, from 0 to below 1"):
            scheduler(warmup=warmup)
    for milestones in ((0.5, 163889), 0.5):
        with pytest.raises(UserError, match="param_scheduler.milestones.* is .*: give a "):
            scheduler(kind=StepsWithWarmup, milestones=milestones)


ROOT = Path(__file__).resolve().parent.parent
LINEAR, STEPS, POLY = {"type": "LinearLR", "start_factor": 1e-3}, {"type": "MultiStepLR"}, {"type": "PolyLR"}
COSINE = {"type": "CosineAnnealingLR"}

#: Configs of mmdet_configs and mmseg_configs -> steps of the run, and their schedule in mmengine's terms, in steps:
#: the end of LinearLR, the milestones, the start of PolyLR. Those of a published recipe are that recipe's numbers.
IN_STEPS = {
    "semaim_mask_rcnn scratch_mask_rcnn mae_mask_rcnn plain_mask_rcnn semaim_cascade_mask_rcnn"
    " semaim_mask_rcnn_large": (
        184375,
        [LINEAR | {"end": 251}, STEPS | {"milestones": [163889, 177546]}],
    ),
    "semaim_mask_rcnn_25ep": (46094, [LINEAR | {"end": 251}, STEPS | {"milestones": [40972, 44387]}]),
    "semaim_mask_rcnn_1gpu": (368750, [LINEAR | {"end": 2001}, STEPS | {"milestones": [327778, 355092]}]),
    "semaim_mask_rcnn_huge": (138281, [LINEAR | {"end": 189}, STEPS | {"milestones": [122916, 133159]}]),
    "semaim_mask_rcnn_li2021": (184375, [LINEAR | {"end": 462}, COSINE | {"T_max": 184375}]),
    "semaim_mask_rcnn_scenes plain_mask_rcnn_scenes plain_mask_rcnn_small": (
        1000,
        [LINEAR | {"end": 50}, STEPS | {"milestones": [800, 925]}],
    ),
    "semaim_mask_rcnn_scenes_easy": (900, [LINEAR | {"end": 50}, STEPS | {"milestones": [720, 840]}]),
    "semaim_mask_rcnn_overfit": (1000, [LINEAR | {"end": 50}, STEPS | {"milestones": [850, 950]}]),
    "semaim_mask_rcnn_cifar10": (5000, [LINEAR | {"end": 250}, STEPS | {"milestones": [4250, 4750]}]),
    "semaim_upernet mae_upernet scratch_upernet semaim_upernet_1gpu semaim_upernet_640 semaim_upernet_large"
    " semaim_upernet_ms plain_upernet": (
        160000,
        [LINEAR | {"start_factor": 1e-6, "end": 1500}, POLY | {"begin": 1500}],
    ),
    "semaim_linear semaim_linear_4blocks mae_linear plain_linear": (
        40000,
        [LINEAR | {"start_factor": 1e-6, "end": 1500}, POLY | {"begin": 1500}],
    ),
    "semaim_upernet_camvid semaim_linear_camvid plain_linear_camvid plain_upernet_small": (
        500,
        [LINEAR | {"end": 50}, POLY | {"begin": 50}],
    ),
    "semaim_upernet_scenes plain_upernet_scenes semaim_linear_scenes plain_linear_scenes": (
        1000,
        [LINEAR | {"end": 50}, POLY | {"begin": 50}],
    ),
    "semaim_upernet_scenes_easy semaim_linear_scenes_easy": (400, [LINEAR | {"end": 50}, POLY | {"begin": 50}]),
    "semaim_upernet_cifar10": (5000, [LINEAR | {"end": 250}, POLY | {"begin": 250}]),
}

#: Patterns of configs of the stages on images, the later ones first -> epochs, epochs of warm-up, lowest rate.
IN_EPOCHS = {
    "pretrain/*_800e": (800, 30, 0),
    "pretrain/mae_*_800e": (800, 40, 0),
    "pretrain/mae_vit_base_1600e": (1600, 40, 0),
    "pretrain/*_400e": (400, 30, 0),
    "pretrain/semaim_vit_small_112px_300e": (300, 15, 0),
    "pretrain/*_tiny_scenes": (30, 2, 0),
    "pretrain/*_tiny_scenes_easy": (6, 0.6, 0),
    "pretrain/*_tiny_cifar10": (3, 0.3, 0),
    "finetune/vit_base*_100e": (100, 20, 1e-6),
    "finetune/vit_base_100e_mae": (100, 5, 1e-6),
    "finetune/plain_vit_100e": (100, 20, 1e-6),
    "finetune/plain_vit_small": (30, 3, 1e-6),
    "finetune/vit_large_50e": (50, 5, 1e-6),
    "finetune/vit_tiny_scenes": (10, 1, 1e-6),
    "finetune/vit_tiny_scenes_easy": (80, 8, 1e-6),
    "finetune/vit_tiny_cifar10": (5, 0.5, 1e-6),
    "linear/vit_*_90e": (90, 0, 0),
    "linear/vit_base_90e_mae": (90, 10, 0),
    "linear/plain_vit_90e": (90, 10, 0),
    "linear/vit_tiny_scenes": (10, 0, 0),
    "attentive/*_90e": (90, 10, 0),
    "attentive/vit_tiny_scenes": (10, 1, 0),
}


#: Configs of SimMIM -> epochs, epochs of warm-up.
SIMMIM = {
    "pretrain/simmim_vit_base_800e": (800, 10),
    "pretrain/simmim_vit_tiny_scenes_easy": (6, 0.6),
    "pretrain/simmim_vit_tiny_cifar10": (3, 0.3),
}


def in_closed_form(parts, steps):
    """The rate of each step of a run by mmengine's formulas for its schedulers, of a peak of 1."""
    step, rate = np.arange(steps), np.ones(steps)
    for part in parts:
        begin, end = part.get("begin", 0), part.get("end", steps)
        done = np.clip(step - begin, 0, end - begin - 1) / (end - begin - 1)  # 1 in the last step of the stretch
        rate *= {
            "LinearLR": lambda done, part=part: part.get("start_factor", 1) * (1 - done) + done,
            "PolyLR": lambda done: 1 - done,
            "CosineAnnealingLR": lambda done: (1 + np.cos(np.pi * step / steps)) / 2,
            "MultiStepLR": lambda done, part=part: 0.1 ** np.searchsorted(part["milestones"], step, side="right"),
        }[part["type"]](done)
    return rate


@pytest.mark.parametrize("names", IN_STEPS, ids=lambda names: names.split()[0])
def test_every_dense_config_has_the_rates_of_its_recipe_step_by_step(names):
    steps, parts = IN_STEPS[names]
    expected = in_closed_form(parts, steps)
    if steps <= 5000:  # the formulas are mmengine's
        assert walked(parts, steps) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    for name in names.split():
        folder = "mmdet_configs" if "mask_rcnn" in name else "mmseg_configs"
        cfg = load_config(ROOT / folder / f"{name}.py", check=False)
        assert cfg.train_cfg.max_iters == steps
        np.testing.assert_allclose(rates(cfg), expected, rtol=1e-12, atol=1e-15, err_msg=name)


@pytest.mark.parametrize("pattern", IN_EPOCHS)
def test_every_config_on_images_has_the_rates_of_its_recipe_step_by_step(pattern):
    others = [path for later in list(IN_EPOCHS)[list(IN_EPOCHS).index(pattern) + 1 :] for path in matching(later)]
    epochs, warm, lowest = IN_EPOCHS[pattern]
    per_epoch, peak = 10, 1e-3
    now = np.arange(epochs * per_epoch) / per_epoch
    fall = lowest + (peak - lowest) * (1 + np.cos(np.pi * (now - warm) / (epochs - warm))) / 2
    expected = np.where(now < warm, peak * now / (warm or 1), fall)
    for path in set(matching(pattern)) - set(others):
        cfg = load_config(path)
        assert cfg.train_cfg.max_epochs == epochs, path
        np.testing.assert_allclose(rates(cfg, per_epoch, peak), expected, rtol=1e-12, atol=1e-18, err_msg=str(path))


def matching(pattern):
    """The config files that a pattern means."""
    return [path for path in CONFIGS.glob(f"{pattern}.py") if ("simmim" in pattern) == ("simmim" in path.stem)]


@pytest.mark.parametrize("pattern", SIMMIM)
def test_simmim_falls_to_a_tenth_after_seven_eighths(pattern):
    """Its official recipe: 10 epochs of warm-up from 1/200 of the peak, and a tenth of it after epoch 700 of 800."""
    epochs, warm = SIMMIM[pattern]
    (path,) = matching(pattern)
    now = np.arange(epochs * 40) / 40
    expected = np.where(now < warm, 0.005 + 0.995 * now / warm, np.where(now < epochs * 7 / 8, 1, 0.1))
    np.testing.assert_allclose(rates(load_config(path), 40, 1.0), expected, rtol=1e-12)


def test_every_schedule_is_compared():
    ours = {
        path for path in CONFIGS.rglob("*.py") if path.parent.name in ("pretrain", "finetune", "linear", "attentive")
    }
    fast = {path for path in ours if path.stem.endswith("fast")}  # measures features, without a schedule
    assert ours - fast == {path for pattern in [*IN_EPOCHS, *SIMMIM] for path in matching(pattern)}
    dense = {path.stem for folder in ("mmdet_configs", "mmseg_configs") for path in (ROOT / folder).glob("*.py")}
    dense -= {name for name in dense if "knn" in name}  # without training
    assert dense == {name for names in IN_STEPS for name in names.split()}


@pytest.mark.parametrize("steps", [1, 2, 3, 50, 7375])
@pytest.mark.parametrize(
    "name", ["mmdet_configs/semaim_mask_rcnn", "mmdet_configs/semaim_mask_rcnn_li2021", "mmseg_configs/semaim_upernet"]
)
def test_a_run_of_any_length_rises_to_its_peak_and_falls(name, steps):
    cfg = load_config(ROOT / f"{name}.py", {"train_cfg.max_iters": steps}, check=False)
    found = rates(cfg)
    assert found[0] < 0.01 and found.max() <= 1
    soonest = 50 if name.endswith("li2021") else 2  # whose cosine has begun to fall before the warm-up ends
    assert steps < soonest or found.max() == pytest.approx(1, abs=0.002)
    assert steps < 50 or found[-1] < 0.02


def test_schedules_in_words():
    steps = {"type": "StepsWithWarmup", "warmup": 0.001356, "milestones": (0.888889, 0.962961)}
    assert describe(steps, 184375) == "warm-up 250 steps, then x 0.1 at steps 163,889 and 177,546"
    poly = {"type": "PolyWithWarmup", "warmup": 0.01}
    assert describe(poly, 400) == "warm-up 4 steps, then polynomial to 0"
    cosine = {"type": "CosineWithWarmup", "warmup": 2 / 30, "min_lr": 1e-6}
    assert describe(cosine, 600, 30) == "warm-up 2 epochs = 40 steps, then cosine to 1e-06"


def test_keys_that_there_were_once_name_those_of_now():
    config = CONFIGS / "pretrain/semaim_vit_base_800e.py"
    with pytest.raises(
        UserError, match="param_scheduler.warmup_epochs.*: set param_scheduler.warmup, a share of the r"
    ):
        load_config(config, {"param_scheduler.warmup_epochs": 30})
    with pytest.raises(UserError, match="param_scheduler.steps: the run sets it"):
        load_config(config, {"param_scheduler.steps": 30})
    with pytest.raises(UserError, match="param_scheduler.warmup is 30: give a share"):
        load_config(config, {"param_scheduler.warmup": 30})


def test_a_file_with_the_keys_of_once_is_an_error_that_names_those_of_now(tmp_path):
    base = CONFIGS / "pretrain/semaim_vit_base_800e.py"
    path = tmp_path / "own.py"
    path.write_text(f'_base_ = "{base}"\n_mine = 3\nparam_scheduler = dict(warmup_epochs=_mine)\n')
    with pytest.raises(UserError, match="param_scheduler.warmup_epochs.*: set param_scheduler.warmup, a share"):
        load_config(path)
    path.write_text(f'_base_ = "{base}"\nparam_scheduler = [dict(type="LinearLR", by_epoch=False, end=50)]\n')
    with pytest.raises(UserError, match="param_scheduler must be one dict, of type CosineWithWarmup, PolyWithWarmup,"):
        load_config(path)
    path.write_text(f'_base_ = "{base}"\n_mine = 3\nparam_scheduler = dict(warmup=_mine / 800)\n')
    assert load_config(path).param_scheduler.warmup == 3 / 800 and "_mine" not in load_config(path)


@given(st.integers(1, 4096), st.integers(1, 64), st.integers(1, 512))
def test_a_plan_keeps_the_total_batch(total, processes, most):
    if total % processes:
        with pytest.raises(UserError, match="cannot be split evenly"):
            plan_batch(total, processes, most, 1e-3)
        return
    plan = plan_batch(total, processes, most, 1e-3)
    assert plan.processes * plan.images * plan.accumulation == total and plan.images <= most
    fewer = [n for n in range(1, plan.accumulation) if total // processes % n == 0]
    assert all(total // processes // n > most for n in fewer), "fewer accumulated steps would have done"
    assert plan.lr == pytest.approx(1e-3 * total / 256)


def test_the_papers_plan_in_words():
    plan = str(plan_batch(2048, 8, 128, 2e-4))
    assert plan == ("batch 2048 = 8 processes x 128 images x 2 accumulated; learning rate 0.0016 = 0.0002 x 2048 / 256")


def test_groups_decay_matrices_alone_and_hold_every_trained_parameter_once():
    model = VisionTransformer("tiny", img_size=32, embed_dim=16, depth=2, num_heads=2)
    groups = group_parameters(model.named_parameters(), 1e-3, 0.05)
    assert len(groups) == 2
    names = [name for group in groups for name in group["names"]]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(names) == sorted(trained) and "pos_embed" not in names
    decayed = next(group["names"] for group in groups if group["weight_decay"])
    assert "cls_token" in decayed and all(name.endswith("weight") for name in decayed if name != "cls_token")
    assert not any("norm" in name for name in decayed)


def test_layer_decay_falls_towards_the_input():
    model = VisionTransformer("tiny", img_size=32, embed_dim=16, depth=2, num_heads=2)
    groups = group_parameters(model.named_parameters(), 1.0, 0.05, 0.5, model.get_layer_depth, ("cls_token",))
    scale = {name: group["lr"] for group in groups for name in group["names"]}
    assert scale["norm.weight"] == 1 and scale["blocks.1.mlp.fc1.weight"] == 0.5
    assert scale["blocks.0.norm1.bias"] == 0.25 and scale["cls_token"] == scale["patch_embed.proj.weight"] == 0.125
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert decay["cls_token"] == 0 and decay["patch_embed.proj.weight"] == 0.05
