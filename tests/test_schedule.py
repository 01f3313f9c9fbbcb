"""Learning rates, batch arithmetic, optimizer groups."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from semaim.engine.optim import group_parameters
from semaim.engine.schedule import CosineWithWarmup, cosine_with_warmup, plan_batch
from semaim.errors import UserError
from semaim.models import VisionTransformer


def test_schedule_of_the_reference(shared):
    recorded = json.loads((shared / "golden/semaim/ema.json").read_text())["scalars"]["lr_schedule"]
    cfg = recorded["config"]
    for epoch, lr in zip(recorded["epoch"], recorded["lr"], strict=True):
        ours = cfg["lr"] * cosine_with_warmup(epoch, cfg["epochs"], cfg["warmup_epochs"], cfg["min_lr"] / cfg["lr"])
        assert ours == pytest.approx(lr, rel=1e-12, abs=1e-15)


def scheduler(accumulation=1, epochs=4, **options):
    parameter = nn.Parameter(torch.zeros(1))
    groups = [{"params": [parameter], "lr": 2.0}, {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.5}]
    optimizer = torch.optim.SGD(groups)
    return optimizer, CosineWithWarmup(
        optimizer,
        epochs=epochs,
        warmup_epochs=1,
        iterations_per_epoch=6,
        accumulation=accumulation,
        peak_lr=2.0,
        **options,
    )


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
def test_seek_is_as_if_the_steps_had_been_made(iteration):
    optimizer, schedule = scheduler(end=24)
    for _ in range(iteration):
        optimizer.step()
        schedule.step()
    sought_optimizer, sought = scheduler(end=24)
    sought_optimizer.step()
    sought.seek(iteration)
    for _ in range(24 - iteration):
        assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in sought_optimizer.param_groups]
        for o, s in ((optimizer, schedule), (sought_optimizer, sought)):
            o.step()
            s.step()


def test_warmup_must_end_before_the_run_does():
    with pytest.raises(UserError, match="warm-up of 1 epochs must be shorter than the run of 1"):
        scheduler(epochs=1)


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
