"""Learning rate schedules of the published recipes, as shares of a run, and batch arithmetic."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mmengine.optim.scheduler.param_scheduler import INF, _ParamScheduler
from mmengine.registry import PARAM_SCHEDULERS

from semaim.errors import UserError


def warm_up(step: float, length: float, start: float = 0.0) -> float:
    """Share of the peak learning rate at a step of the warm-up: linear from `start` to 1 at `length`."""
    return start + (1 - start) * step / length if step < length else 1.0


def cosine(done: float, floor: float = 0.0) -> float:
    """Share of the peak when a share `done` (0 to 1) of the decay has passed: half a cosine from 1 to `floor`."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)) if done > 0 else 1.0


def cosine_with_warmup(now: float, length: float, warmup: float, floor: float = 0.0) -> float:
    """Share of the peak learning rate: MAE's and SemAIM's schedule.

    It rises linearly from 0, then falls as half a cosine to `floor`. It is evaluated at the start of each step, so the
    first step has learning rate 0.

    Args:
        now, length, warmup: the time, the length of the run, and that of its warm-up, all in epochs or all in steps.
        floor: the share at the end of the cosine.
    """
    return warm_up(now, warmup) * cosine((now - warmup) / (length - warmup), floor)


class ScheduleInShares(_ParamScheduler):
    """A learning rate in closed form, so that a run can resume at any step: a warm-up, then a decay given by `fall`.

    Configs give shares of the run, so that a run of another length has a schedule of the same shape. mmengine's
    schedulers count in iterations and multiply step by step.

    Args:
        steps: optimizer steps of the run; set by the engine.
        accumulation: iterations per optimizer step, during which the rate is constant; set by the engine.
        peak_lr: the highest rate of a parameter group of scale 1; set by the engine.
        warmup: share of the run, from 0 to below 1, after which the rate is at its peak: 40 / 800.
        start_factor: share of the peak that the warm-up starts from.
        end, by_epoch, verbose: as for mmengine's schedulers; `by_epoch` is always False.
    """

    def __init__(
        self,
        optimizer,
        steps: int,
        accumulation: int = 1,
        peak_lr: float = 1.0,
        warmup: float = 0.0,
        start_factor: float = 0.0,
        end: int = INF,
        by_epoch: bool = False,
        verbose: bool = False,
    ):
        check_share("warmup", warmup)
        self.steps, self.accumulation, self.peak_lr = steps, accumulation, peak_lr
        self.warmup, self.start_factor = warmup * steps, start_factor  # in steps, not always an integer
        super().__init__(optimizer, param_name="lr", end=end, by_epoch=by_epoch, verbose=verbose)

    def fall(self, step: int) -> float:
        """The decay factor of a step, by which the warm-up's share of the peak is multiplied."""
        raise NotImplementedError

    def share(self, step: int) -> float:
        """Share of the peak learning rate in a step; steps count from 0."""
        return warm_up(step, self.warmup, self.start_factor) * self.fall(step)

    def _get_value(self) -> list[float]:
        share = self.share(self.last_step // self.accumulation)
        return [base * share for base in self.base_values]

    def seek(self, iteration: int) -> None:
        """Set the state to that after `iteration` iterations."""
        self.last_step = iteration - 1
        self._global_step = iteration - 1
        self.step()


@PARAM_SCHEDULERS.register_module()
class CosineWithWarmup(ScheduleInShares):
    """MAE's and SemAIM's schedule, `cosine_with_warmup`: a linear warm-up, then half a cosine.

    Args:
        min_lr: the rate of a parameter group of scale 1 at the end.
        from_start: whether the cosine spans the whole run, including the warm-up, as in hustvl/MIMDet; else it starts
            where the warm-up ends.
        run: as for `ScheduleInShares`.
    """

    def __init__(self, optimizer, min_lr: float = 0.0, from_start: bool = False, **run):
        self.min_lr, self.from_start = min_lr, from_start
        super().__init__(optimizer, **run)

    def fall(self, step: int) -> float:
        """Share of the peak rate in a step after the warm-up."""
        begin = 0 if self.from_start else self.warmup
        return cosine((step - begin) / (self.steps - begin), self.min_lr / self.peak_lr)


@PARAM_SCHEDULERS.register_module()
class PolyWithWarmup(ScheduleInShares):
    """mmsegmentation's polynomial decay: a power of the remaining share of the run, to `min_lr` in the last step.

    As there, the peak lasts two steps: the last of the warm-up and the first of the decay.

    Args:
        min_lr: the rate of a parameter group of scale 1 in the last step.
        power: 1 is linear.
        run: as for `ScheduleInShares`.
    """

    def __init__(self, optimizer, min_lr: float = 0.0, power: float = 1.0, **run):
        self.min_lr, self.power = min_lr, power
        super().__init__(optimizer, **run)

    def fall(self, step: int) -> float:
        """Share of the peak rate in a step after the warm-up."""
        begin, last = self.warmup + 1, self.steps - 1
        if step <= begin:
            return 1.0
        floor = self.min_lr / self.peak_lr
        return floor + (1 - floor) * max(0.0, 1 - (step - begin) / (last - begin)) ** self.power


@PARAM_SCHEDULERS.register_module()
class StepsWithWarmup(ScheduleInShares):
    """detectron2's step decay: multiplied by `gamma` at every milestone.

    Args:
        milestones: shares of the run; the nearest whole step is the first with the lower rate.
        gamma: factor.
        run: as for `ScheduleInShares`.
    """

    def __init__(self, optimizer, milestones: tuple[float, ...] = (), gamma: float = 0.1, **run):
        self.milestones, self.gamma = milestones_in_steps(milestones, run["steps"]), gamma
        super().__init__(optimizer, **run)

    def fall(self, step: int) -> float:
        """Share of the peak rate in a step after the warm-up."""
        return self.gamma ** sum(milestone <= step for milestone in self.milestones)


#: Arguments that the engine sets in every schedule.
GIVEN = ("optimizer", "steps", "accumulation", "peak_lr", "end", "by_epoch")


def check_share(name: str, value: object) -> None:
    """`UserError` if a value is not a share of a run."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise UserError(
            f"param_scheduler.{name} is {value!r}: give a share of the run, from 0 to below 1: 0.05 for 40 of 800"
            " epochs"
        )


def milestones_in_steps(milestones: object, steps: int) -> list[int]:
    """Shares of a run -> its steps; `UserError` if they are not shares."""
    if not isinstance(milestones, list | tuple):
        raise UserError(f"param_scheduler.milestones is {milestones!r}: give a list of shares of the run")
    for index, milestone in enumerate(milestones):
        check_share(f"milestones.{index}", milestone)
    return [round(milestone * steps) for milestone in milestones]


def check_schedule(settings: object) -> None:
    """`UserError` if a config's `param_scheduler` is not one of these schedules or has impossible numbers."""
    kinds = PARAM_SCHEDULERS.module_dict.items()
    known = [name for name, kind in kinds if isinstance(kind, type) and issubclass(kind, ScheduleInShares)]
    if not isinstance(settings, Mapping) or settings.get("type") not in known:
        raise UserError(
            f"param_scheduler must be one dict, of type {', '.join(sorted(known))}: its warm-up and milestones are"
            " shares of the run, whose length train_cfg gives"
        )
    for key in GIVEN:
        if key in settings:
            raise UserError(f"param_scheduler.{key}: the run sets it, from train_cfg and the batch: leave it out")
    check_share("warmup", settings.get("warmup", 0.0))
    milestones_in_steps(settings.get("milestones", ()), 1)


def describe(settings: Mapping, steps: int, epochs: int | None = None) -> str:
    """A config's `param_scheduler` in words.

    Args:
        settings: checked by `check_schedule`.
        steps: optimizer steps of the run.
        epochs: of the run, if it is counted in epochs.
    """
    warm = settings.get("warmup", 0.0)
    in_epochs = f"{round(warm * epochs, 9):g} epochs = " if epochs else ""
    if settings["type"] == "StepsWithWarmup":
        places = " and ".join(f"{step:,}" for step in milestones_in_steps(settings.get("milestones", ()), steps))
        then = f"x {settings.get('gamma', 0.1):g} at steps {places}"
    else:
        shape = "cosine" if settings["type"] == "CosineWithWarmup" else "polynomial"
        then = f"{shape} to {settings.get('min_lr', 0):g}"
    return f"warm-up {in_epochs}{round(warm * steps):,} steps, then {then}"


@dataclass(frozen=True)
class BatchPlan:
    """How a total batch is split: `total = processes * images * accumulation`."""

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


def schedule_of(settings: Mapping, plan: BatchPlan, steps: int) -> dict:
    """A config's `param_scheduler` for mmengine's runner, for a run of `steps` optimizer steps."""
    run = {"steps": steps, "accumulation": plan.accumulation, "peak_lr": plan.lr}
    return {**settings, **run, "by_epoch": False}
