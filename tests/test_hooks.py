"""The running average in a real run, against a slow computation of it beside the run."""

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch.optim.optimizer import register_optimizer_step_post_hook

from semaim.checkpoints.files import newest_checkpoint, read_checkpoint
from semaim.engine.training import train


@HOOKS.register_module()
class Slow(Hook):
    """The official update in fp64, from the weights that the optimizer leaves: once a step, by the epoch's decay.

    Five steps an epoch; 0.999 + 0.0009 x epoch / 100, epochs counted from 0.
    """

    steps = 0

    def before_train(self, runner) -> None:
        self.weights = dict(runner.model.network.named_parameters())
        self.averages = {n: w.detach().double() for n, w in self.weights.items() if f"ema.{n}" in self.weights}
        self.handle = register_optimizer_step_post_hook(self.step)

    def step(self, *_) -> None:
        decay = 0.999 + 0.0009 * (self.steps // 5) / 100
        self.steps += 1
        for name, average in self.averages.items():
            self.averages[name] = decay * average + (1 - decay) * self.weights[name].detach().double()

    def after_train(self, runner) -> None:
        self.handle.remove()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_running_average_follows_every_step_of_the_optimizer_with_its_epochs_decay(tiny_config, accumulation):
    """At a rate so high that weights leave their average by 0.2: the decays of two epochs differ by 9e-6 of that."""
    cfg = tiny_config(
        images_per_gpu=8 // accumulation,
        base_lr=1.0,  # peak 0.03 = 1.0 x 8 / 256
        **{
            "model.network.guide": "ema",
            "train_cfg.max_epochs": 3,
            "param_scheduler.warmup": 0.2 / 3,
            "custom_hooks": [{"type": "Slow"}],
        },
    )
    runner = train(cfg)
    slow = next(hook for hook in runner.hooks if isinstance(hook, Slow))
    assert slow.steps == 15 and runner.iter == 15 * accumulation
    saved = read_checkpoint(newest_checkpoint(cfg.work_dir))["model"]
    assert slow.averages.keys() == {name.removeprefix("ema.") for name in saved if name.startswith("ema.")}
    moved = 0.0
    for name, average in slow.averages.items():
        torch.testing.assert_close(saved[f"ema.{name}"].double(), average, atol=5e-7, rtol=0)
        moved = max(moved, (saved[name] - average).abs().max().item())
    assert moved > 0.2
