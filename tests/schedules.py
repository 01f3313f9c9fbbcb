"""Learning rates step by step: of a config, and of mmengine's schedulers."""

import mmengine.optim  # noqa: F401  registers the schedulers
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import PARAM_SCHEDULERS

from semaim.engine.schedule import BatchPlan, schedule_of


def rates(cfg: Config, per_epoch: int = 1, peak: float = 1.0) -> np.ndarray:
    """The rate of every optimizer step of a run that a config describes, whose epochs have so many steps."""
    epochs = cfg.train_cfg.get("max_epochs")
    steps = epochs * per_epoch if epochs else cfg.train_cfg.max_iters
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    settings = schedule_of(cfg.param_scheduler, BatchPlan(256, 1, 256, 1, peak), steps)
    schedule = PARAM_SCHEDULERS.build({**settings, "optimizer": optimizer})
    return np.array([peak * schedule.share(step) for step in range(steps)])


def walked(parts: list[dict], steps: int) -> np.ndarray:
    """The rate of every iteration by mmengine's schedulers, which know the step before alone; of a peak of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    run = {"by_epoch": False, "optimizer": optimizer}
    schedulers = [PARAM_SCHEDULERS.build({"end": steps, **part, **run}) for part in parts]
    optimizer.step()
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        for scheduler in schedulers:
            scheduler.step()
    return np.array(found)
