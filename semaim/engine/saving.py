"""A run's checkpoints: what they hold, when they are saved, and how a run resumes from one exactly."""

import math
import os
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.registry import HOOKS

from semaim import __version__
from semaim.checkpoints.divided import load_whole_state
from semaim.checkpoints.files import FORMAT, NUMBERED, newest_checkpoint, numbered, plain, read_checkpoint, run_in
from semaim.engine.full_disk import write_or_rescue
from semaim.engine.hooks import read_outputs
from semaim.engine.sharding import gathered, is_sharded, load_whole_optimizer
from semaim.engine.watching import progress
from semaim.errors import Diverged, UserError

HISTORY = 100  #: logged values saved per scalar, so that smoothed numbers continue after resuming


def choose_checkpoint(cfg: Config, resume: str | None) -> str | None:
    """The checkpoint to resume from.

    Args:
        cfg: names the work folder.
        resume: None to start anew, "auto" for the newest checkpoint in the work folder, or a path.
    """
    if resume not in (None, "auto"):
        run = read_checkpoint(resume, mmap=True).get("saving", {}).get("run")
        latest, others = Path(cfg.work_dir) / "latest.pth", numbered(cfg.work_dir)
        # It may be damaged, which is why another is named, or lost; the others are the same run's.
        there = next(filter(None, map(run_in, [latest, *reversed(others)])), None)
        if run and there and run != there:
            raise UserError(f"{cfg.work_dir} holds another run than {resume}: choose another --work-dir")
        return resume
    newest = newest_checkpoint(cfg.work_dir)
    if resume is None and newest:
        raise UserError(f"{newest} is there already: continue with --resume, or choose another --work-dir")
    if newest:
        try:
            read_checkpoint(newest, mmap=True)
        except UserError as error:
            others = [path for path in numbered(cfg.work_dir) if not path.samefile(newest)]
            if not others:
                raise
            raise UserError(f"{error}; continue from an earlier one with --resume {others[-1]}") from None
    return str(newest) if newest else None


def saved_module(runner) -> torch.nn.Module:
    """The module whose weights are saved: the bare network, so that its names have no prefix, or a whole detector."""
    model = getattr(runner.model, "module", runner.model)
    return getattr(model, "network", model)


def training_state(runner, epoch: int, iteration: int) -> dict:
    """Everything a run needs to continue after `epoch` finished epochs and `iteration` finished iterations."""
    accumulation = runner.train_dataloader.batch_sampler.accumulation
    history = {
        name: [(torch.from_numpy(part[-HISTORY:].copy())) for part in buffer.data]
        for name, buffer in runner.message_hub.log_scalars.items()
    }
    return {
        "format": FORMAT,
        "version": __version__,
        "epoch": epoch,
        "step": iteration // accumulation,  # optimizer steps: the same for any number of processes
        "images": runner.train_dataloader.batch_sampler.length,
        "classes": getattr(runner.train_dataloader.dataset, "classes", None),
        "model": saved_module(runner).state_dict(),
        "optimizer": runner.optim_wrapper.optimizer.state_dict(),
        "history": history,
        "config": runner.cfg.to_dict(),
        "data": runner.data_identity,
    }


def for_mm(runner, state: dict) -> dict:
    """What mmdet's and mmseg's own loaders read from a detector's or segmentor's file; empty for other networks.

    `state_dict` has the same tensors as `model`, which torch writes only once; `meta` has the classes and colours.

    Args:
        runner: of the run.
        state: from `training_state`, on the CPU.
    """
    model = getattr(runner.model, "module", runner.model)
    if saved_module(runner) is not model:
        return {}
    info = runner.train_dataloader.dataset.metainfo
    named = {name: info[name] for name in ("classes", "palette") if info.get(name)}
    return {"meta": {"dataset_meta": named}, "state_dict": state["model"]}


def restore_training_state(runner, checkpoint: dict, path: str | os.PathLike) -> None:
    """Continue a run from `training_state`, on any number of processes."""
    if "optimizer" not in checkpoint:
        raise UserError(f"{path} holds weights and no run to resume: start from it with --pretrained")
    optimizer = runner.optim_wrapper.optimizer
    rates = [{k: v for k, v in group.items() if k in ("lr", "initial_lr")} for group in optimizer.param_groups]
    try:
        load_whole_state(saved_module(runner), checkpoint["model"])
        load_whole_optimizer(optimizer, checkpoint["optimizer"])
    except (RuntimeError, ValueError) as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not fit this config ({first}): resume with the config it was made by") from None
    batches = runner.train_dataloader.batch_sampler
    iteration = checkpoint["step"] * batches.accumulation
    epoch = checkpoint["epoch"]
    if checkpoint["images"] != batches.length:
        # A data set of another size has another shuffle: restart its epoch.
        runner.logger.warning(f"the data had {checkpoint['images']} images and has {batches.length} now")
        iteration = epoch * len(batches)
    runner.train_loop.seek(epoch, iteration)
    # The config's rates and schedule, not the file's: accumulation or the base rate may have changed.
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group.update(rate)
    for scheduler in runner.param_schedulers:
        scheduler.seek(iteration)
    for hook in runner.hooks:
        if isinstance(hook, SaveCheckpoints):
            hook.restore(checkpoint.get("saving"), path, runner.work_dir)
            if runner.cfg.get("overrides") != checkpoint["config"].get("overrides"):
                hook.saving.loss = None  # it may be of another scale from here on
    for name, (values, counts) in checkpoint["history"].items():
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            runner.message_hub.update_scalar(name, value, int(count))


@HOOKS.register_module()
class SaveCheckpoints(Hook):
    """Saves epoch_N.pth or iter_N.pth and points latest.pth at it; deletes older ones of this run only after that.

    A state that is not finite, or has exploded, is not saved. One that is much worse than an earlier one is, but the
    last good one is kept besides the newest, and named if the run then diverges.

    Args:
        interval: epochs or iterations between two checkpoints; the last is always saved.
        keep: number of newest checkpoints to keep; 0 keeps all.
        by_epoch: whether the run counts in epochs.

    Attributes:
        rescue_dir: folder for the state if the work folder cannot be written; None for none.
    """

    priority = "VERY_LOW"
    rescue_dir: str | None = None

    def __init__(self, interval: int = 20, keep: int = 3, by_epoch: bool = True):
        self.interval, self.keep, self.by_epoch = interval, keep, by_epoch
        self.saving = Saving(uuid.uuid4().hex)

    def before_train(self, runner) -> None:
        """Note how large the weights are at the start of the run; all processes give it the same name."""
        shared = [self.saving.run]
        broadcast_object_list(shared)
        self.saving.run = shared[0]
        if self.saving.norm is None and not is_sharded(runner.model):
            self.saving.norm = norm_of(saved_module(runner).parameters())

    def after_train_epoch(self, runner) -> None:
        """Save after every `interval` epochs and after the last."""
        done = runner.epoch + 1
        if self.by_epoch and (done % self.interval == 0 or done == runner.max_epochs):
            self.save(runner, done, runner.iter, f"epoch_{done}.pth")

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Save after every `interval` iterations and after the last."""
        done = runner.iter + 1
        if not self.by_epoch and (done % self.interval == 0 or done == runner.max_iters):
            self.save(runner, done // len(runner.train_dataloader.batch_sampler), done, f"iter_{done}.pth")

    def restore(self, saving: dict | None, path: str | os.PathLike, folder: str) -> None:
        """Continue with what the run had saved when it wrote the checkpoint at `path`, which it resumes from."""
        if saving is None:
            return
        self.saving = Saving.read(saving, path)
        for name, time in self.saving.written.items():
            if time == 0 and os.path.realpath(path) == os.path.realpath(Path(folder) / name):
                self.saving.written[name] = modified(Path(path)) or 0
        if not (Path(folder) / self.saving.good).exists():
            self.saving.good = os.path.relpath(path, folder)

    def save(self, runner, epoch: int, iteration: int, name: str, alone: bool = False) -> None:
        """Write `name` in the work folder, point latest.pth at it, and delete old checkpoints.

        Every process has to call it, unless `alone`: then this one writes, and the weights must not be sharded.
        """
        read_outputs(runner, alone)
        progress("saving")
        state = gathered(training_state(runner, epoch, iteration)) if is_sharded(runner.model) else None
        if state and not is_main_process():
            return
        state = state or training_state(runner, epoch, iteration)
        # Every process of DDP has the whole state: all stop if it has exploded.
        weights = [name for name, _ in saved_module(runner).named_parameters()]
        found = self.saving.judge(state, weights, runner.message_hub.log_scalars.get("train/loss"), name)
        folder, written = Path(runner.work_dir), self.saving.written
        if NUMBERED.fullmatch(name):
            written.pop(name, None)
            written[name] = 0  # now the newest; its time is not known before it is there
        if not (is_main_process() or alone):
            return
        if not is_main_process():  # which has written the files, and deleted old ones
            times = {name: time or modified(folder / name) for name, time in written.items()}
            written = self.saving.written = {name: time for name, time in times.items() if time}
        if found:
            runner.logger.warning(f"{name}: {found}")
        state = plain(state | {"saving": asdict(self.saving)})
        write_or_rescue(state | for_mm(runner, state), folder / name, self.rescue_dir)
        link = folder / ".latest.partial"
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        os.replace(link, folder / "latest.pth")
        runner.logger.info(f"saved {folder / name}")
        if name in written:
            written[name] = modified(folder / name) or 0
        for old in list(written)[: -self.keep] if self.keep else []:
            # Not the good one, nor one that somebody has replaced since.
            if old != self.saving.good and modified(folder / old) == written.pop(old):
                (folder / old).unlink()

    def advice(self, runner) -> str:
        """Where to continue from after a divergence."""
        rate = "a lower --cfg-options base_lr=..."
        if not self.saving.good:
            return f"no checkpoint from before that: start anew in another --work-dir with {rate}"
        good = os.path.normpath(os.path.join(runner.work_dir, self.saving.good))
        return f"continue from the last good checkpoint with --resume {good} --override and {rate}"


#: Growth of the norm of all weights since the start of a run that no training comes near: of ViT-B, whose weights start
#: with a norm of about 200, recipes make a few hundred.
EXPLODED = 100
#: A mean loss this many times that of an earlier checkpoint is worse; below this it may be noise.
WORSE = 2
RECENT = 100  #: at most this many losses are in the mean


@dataclass
class Saving:
    """What a run has saved, kept in its checkpoints.

    Args:
        run: a random name of the run, the same after resuming.
        written: names of the checkpoints at intervals, the oldest first -> their time, see `modified`. Other files in
            the folder are not this run's.
        good: the newest checkpoint that was not worse than an earlier one, relative to the work folder; "" for none.
        loss: the lowest mean loss at a checkpoint.
        norm: of all weights at the start.
    """

    run: str
    written: dict[str, int] = field(default_factory=dict)
    good: str = ""
    loss: float | None = None
    norm: float | None = None

    @classmethod
    def read(cls, saved: object, path: str | os.PathLike) -> "Saving":
        """From a checkpoint; `UserError` if it is damaged, as its names are of files that will be deleted."""
        kinds = {"run": str, "written": dict, "good": str, "loss": float | None, "norm": float | None}
        if not isinstance(saved, dict) or saved.keys() != kinds.keys():
            raise UserError(f"{path}: the record of what its run has saved is damaged")
        if not all(isinstance(saved[key], kind) for key, kind in kinds.items()):
            raise UserError(f"{path}: the record of what its run has saved is damaged: {saved}")
        for name, time in saved["written"].items():
            if not isinstance(name, str) or not NUMBERED.fullmatch(name) or type(time) is not int:
                raise UserError(f"{path}: the record of what its run has saved is damaged: {name} at {time}")
        return cls(**{**saved, "written": dict(saved["written"])})

    def judge(self, state: dict, weights: Iterable[str], losses: HistoryBuffer | None, name: str) -> str:
        """Take note of a state that will be saved as `name`; says in words why it is not good, if so.

        Args:
            state: from `training_state`.
            weights: names of the parameters in its model; the other tensors are buffers.
            losses: all so far, those of a resumed run from its checkpoint on.
            name: of the file.

        Raises:
            Diverged: a weight or the optimizer is not finite, a buffer holds NaN, or the weights have exploded.
        """
        model, moments = state["model"], [held.values() for held in state["optimizer"]["state"].values()]
        trained = dict.fromkeys(weights)
        norm = norm_of(model[key] for key in trained)
        buffers = norm_of(value for key, value in model.items() if key not in trained)
        # A buffer may be a mask of -inf.
        finite = {"model": math.isfinite(norm) and not math.isnan(buffers)}
        finite["optimizer"] = math.isfinite(norm_of(chain.from_iterable(moments)))
        for what, is_finite in finite.items():
            if not is_finite:
                raise Diverged(f"the {what} holds infinite numbers or NaN: the run diverged, and {name} was not saved")
        self.norm = self.norm or norm  # of a sharded model, from its first checkpoint
        if norm > EXPLODED * self.norm:
            raise Diverged(
                f"the norm of the weights is {norm:.3g}, and was {self.norm:.3g} at the start: the run diverged, and"
                f" {name} was not saved"
            )
        loss = losses.mean(min(RECENT, len(losses.data[0]))) if losses and len(losses.data[0]) else None
        if loss is not None and self.loss is not None and 0 < WORSE * self.loss < loss:
            return (
                f"the mean loss is {loss:.3g}, and was {self.loss:.3g} before; {self.good} is kept until the loss is"
                f" less than {WORSE} times that again"
            )
        if NUMBERED.fullmatch(name) or not self.good:  # an interrupted.pth will be replaced by the next
            self.good = name
        if loss is not None:
            self.loss = float(loss) if self.loss is None else min(self.loss, float(loss))
        return ""


def modified(path: Path) -> int | None:
    """When a file was modified, in nanoseconds; None if it is not there."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def norm_of(values: Iterable[object]) -> float:
    """The norm of all floating-point tensors among these values; other values, and whole numbers, do not count."""
    tensors = [value.detach() for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]
    norms = [norm.double() for norm in torch._foreach_norm(tensors)] if tensors else []
    return float(torch.stack([norm.cpu() for norm in norms]).norm()) if norms else 0.0
