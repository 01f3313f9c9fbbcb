"""Learning rate and weight decay: the schedule of the published recipes, layer decay, batch arithmetic."""

import math
from dataclasses import dataclass

from mmengine.optim.scheduler.param_scheduler import INF, _ParamScheduler
from mmengine.registry import PARAM_SCHEDULERS

from semaim.errors import UserError


def cosine_with_warmup(epoch: float, epochs: float, warmup_epochs: float, floor: float = 0.0) -> float:
    """Share of the peak learning rate at a fractional epoch.

    Rises linearly from 0 over `warmup_epochs`, then falls as half a cosine to `floor`. MAE's and SemAIM's schedule:
    taken at the start of each step, so the very first step has learning rate 0.
    """
    if epoch < warmup_epochs:
        return epoch / warmup_epochs
    done = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


@PARAM_SCHEDULERS.register_module()
class CosineWithWarmup(_ParamScheduler):
    """`cosine_with_warmup` by iteration, in closed form, so that it can start anywhere.

    mmengine's LinearLR and CosineAnnealingLR multiply step by step: they cannot start at 0 and reach the peak an
    iteration early.

    Args:
        epochs, warmup_epochs: in epochs.
        iterations_per_epoch: batches of one process in an epoch.
        accumulation: iterations of one optimizer step; the rate changes with the steps.
        peak_lr, min_lr: the highest and the lowest rate of a parameter group of scale 1.
        end, by_epoch, verbose: as for mmengine's schedulers; `by_epoch` is always False.
    """

    def __init__(
        self,
        optimizer,
        epochs: int,
        warmup_epochs: float,
        iterations_per_epoch: int,
        accumulation: int,
        peak_lr: float,
        min_lr: float = 0.0,
        end: int = INF,
        by_epoch: bool = False,
        verbose: bool = False,
    ):
        if not 0 <= warmup_epochs < epochs:
            raise UserError(f"warm-up of {warmup_epochs} epochs must be shorter than the run of {epochs}")
        self.epochs, self.warmup_epochs, self.iterations_per_epoch = epochs, warmup_epochs, iterations_per_epoch
        self.accumulation, self.floor = accumulation, min_lr / peak_lr
        super().__init__(optimizer, param_name="lr", end=end, by_epoch=by_epoch, verbose=verbose)

    def _get_value(self) -> list[float]:
        iteration = self.last_step - self.last_step % self.accumulation
        share = cosine_with_warmup(iteration / self.iterations_per_epoch, self.epochs, self.warmup_epochs, self.floor)
        return [base * share for base in self.base_values]

    def seek(self, iteration: int) -> None:
        """Stand where a run stands that has `iteration` iterations behind it."""
        self.last_step = iteration - 1
        self._global_step = iteration - 1
        self.step()


@dataclass(frozen=True)
class BatchPlan:
    """How a total batch is carried: `total = processes * images * accumulation`."""

    total: int
    processes: int
    images: int
    accumulation: int
    base_lr: float
    base_batch: int = 256

    @property
    def lr(self) -> float:
        """Peak learning rate: base x total batch / base batch."""
        return self.base_lr * self.total / self.base_batch

    def __str__(self) -> str:
        return (
            f"batch {self.total} = {self.processes} process{'es' if self.processes > 1 else ''} x {self.images} images"
            f" x {self.accumulation} accumulated; learning rate {self.lr:.4g} = {self.base_lr:g} x {self.total} /"
            f" {self.base_batch}"
        )


def plan_batch(total: int, processes: int, most_images: int, base_lr: float, base_batch: int = 256) -> BatchPlan:
    """The plan with the fewest accumulated steps whose batch per process is at most `most_images`."""
    if total % processes:
        raise UserError(
            f"a total batch of {total} images cannot be split evenly over {processes} processes: change"
            " total_batch_size or the number of GPUs"
        )
    share = total // processes
    accumulation = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= most_images)
    return BatchPlan(total, processes, share // accumulation, accumulation, base_lr, base_batch)
