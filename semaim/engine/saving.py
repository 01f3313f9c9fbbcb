"""A run's checkpoints: what they hold, when they are saved, and how a run resumes from one exactly."""

import os
import re
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from semaim import __version__
from semaim.checkpoints.divided import load_whole_state
from semaim.checkpoints.files import FORMAT, newest_checkpoint, plain, read_checkpoint
from semaim.engine.full_disk import write_or_rescue
from semaim.engine.hooks import read_outputs
from semaim.engine.sharding import gathered, is_sharded, load_whole_optimizer
from semaim.engine.watching import progress
from semaim.errors import UserError

HISTORY = 100  #: logged values saved per scalar, so that smoothed numbers continue after resuming


def choose_checkpoint(cfg: Config, resume: str | None) -> str | None:
    """The checkpoint to resume from.

    Args:
        cfg: names the work folder.
        resume: None to start anew, "auto" for the newest checkpoint in the work folder, or a path.
    """
    newest = newest_checkpoint(cfg.work_dir)
    if resume is None:
        if newest:
            raise UserError(f"{newest} is there already: continue with --resume, or choose another --work-dir")
        return None
    path = newest if resume == "auto" else Path(resume)
    if path is not None:
        read_checkpoint(path, mmap=True)
    return None if path is None else str(path)


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
    for name, (values, counts) in checkpoint["history"].items():
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            runner.message_hub.update_scalar(name, value, int(count))


@HOOKS.register_module()
class SaveCheckpoints(Hook):
    """Saves epoch_N.pth or iter_N.pth and points latest.pth at it; deletes older files only after that.

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

    def save(self, runner, epoch: int, iteration: int, name: str, alone: bool = False) -> None:
        """Write `name` in the work folder, point latest.pth at it, and delete old checkpoints.

        Every process has to call it, unless `alone`: then this one writes, and the weights must not be sharded.
        """
        read_outputs(runner, alone)
        progress("saving")
        state = gathered(training_state(runner, epoch, iteration)) if is_sharded(runner.model) else None
        if not (is_main_process() or alone):
            return
        folder = Path(runner.work_dir)
        state = plain(state or training_state(runner, epoch, iteration))
        write_or_rescue(state | for_mm(runner, state), folder / name, self.rescue_dir)
        link = folder / ".latest.partial"
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        os.replace(link, folder / "latest.pth")
        runner.logger.info(f"saved {folder / name}")
        files = folder.glob("epoch_*.pth" if self.by_epoch else "iter_*.pth")
        numbered = sorted(files, key=lambda path: int(re.findall(r"\d+", path.stem)[0]), reverse=True)
        for old in numbered[self.keep :] if self.keep else []:
            old.unlink()
