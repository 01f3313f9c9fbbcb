"""mmengine's Runner with our checkpoints, a loop that resumes inside an epoch, and DDP that also runs on a CPU."""

import os
import signal
import warnings
from typing import TYPE_CHECKING

import mmengine.device.utils
import numpy as np
import torch
from mmengine.device import get_device
from mmengine.dist import get_rank, get_world_size, is_main_process
from mmengine.model import BaseModel, MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.registry import LOOPS, MODEL_WRAPPERS, RUNNERS
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, Runner
from torch.utils.data import DataLoader, Dataset, default_collate

from semaim.checkpoints.files import CannotSave, read_checkpoint
from semaim.data.folder import EndlessBatches, PretrainImages, ResumableBatches, seed_of
from semaim.data.labelled import LabelledImages
from semaim.engine.launcher import SPAWNED, end_with_parent
from semaim.engine.saving import SaveCheckpoints, restore_training_state
from semaim.engine.schedule import BatchPlan
from semaim.engine.sharding import is_sharded, shard
from semaim.errors import Diverged, UserError

if TYPE_CHECKING:  # importing it registers types that only dense tasks need
    from semaim.engine.dense import SeededImages

if get_device() == "mps":  # mmengine's choice on Apple machines; it supports neither fp64 nor gloo
    mmengine.device.utils.DEVICE = "cpu"


def training_loader(
    images: PretrainImages | LabelledImages, plan: BatchPlan, seed: int, num_workers: int
) -> DataLoader:
    """Shuffled batches of one process of a run."""
    batches = ResumableBatches(len(images), plan.images, plan.accumulation, plan.processes, get_rank(), seed)
    return _loader(images, num_workers, batch_sampler=batches)


def endless_loader(images: "SeededImages", plan: BatchPlan, seed: int, num_workers: int, collate) -> DataLoader:
    """Shuffled batches of one process, epoch after epoch."""
    batches = EndlessBatches(len(images), plan.images, plan.accumulation, plan.processes, get_rank(), seed)
    return _loader(images, num_workers, collate, batch_sampler=batches)


def evaluation_loader(images: LabelledImages, batch: int, num_workers: int) -> DataLoader:
    """Every image once: the data set is interleaved over the processes."""
    share = range(get_rank(), len(images), get_world_size())
    return _loader(images, num_workers, batch_size=batch, sampler=share)


def _loader(images: Dataset, num_workers: int, collate=default_collate, **batches) -> DataLoader:
    """A loader with at most as many workers as the process has cores."""
    if num_workers:
        num_workers = max(1, min(num_workers, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    return DataLoader(
        images,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        worker_init_fn=prepare_worker,
        **batches,
    )


def prepare_worker(worker: int) -> None:
    """Set up a loader's worker at its start."""
    torch.set_num_threads(1)
    # Ctrl-C, or what a scheduler sends to the process group, is for the main process, which ends its workers when it
    # has saved. A worker outside of the group would outlive a killed main process and wait forever.
    if end_with_parent(signal.SIGKILL):
        os.setpgid(0, 0)
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class Stopped(KeyboardInterrupt):
    """A signal stopped the run between two iterations, the same ones in all processes."""


class Resumable(BaseLoop):
    """Base of the loops: they start at any iteration, seed from (seed, iteration, rank) alone, and save when stopped.

    Attributes:
        stop_signal: name of the signal that asked this process to stop.
        stopping: whether this iteration is the last; all processes have to agree, see `DeferredRuntimeInfo`.
    """

    stop_signal: str | None = None
    stopping = False

    def seek(self, epoch: int, iteration: int) -> None:
        """Start after `epoch` whole epochs and `iteration` iterations in all."""
        self._epoch, self._iter = epoch, iteration

    def run(self) -> torch.nn.Module:
        """Train; on Ctrl-C or SIGTERM, or in a single process on bad data, save the run's state before ending."""
        self.stop_signal, self.stopping = None, False
        several = get_world_size() > 1
        # Our launcher passes Ctrl-C on, and ends with SIGTERM the processes that remain after another has failed.
        numbers = [signal.SIGINT] if SPAWNED in os.environ else [signal.SIGINT, signal.SIGTERM]
        handlers = {number: signal.signal(number, self._on_signal) for number in numbers}
        saver = next((hook for hook in self.runner.hooks if isinstance(hook, SaveCheckpoints)), None)
        try:
            return self.work()
        except CannotSave:
            raise
        except Diverged as error:
            raise Diverged(f"{error}; {saver.advice(self.runner)}" if saver else str(error)) from None
        except (UserError, KeyboardInterrupt) as error:
            if several and not isinstance(error, Stopped):
                raise  # the other processes do not know of it
            steps, rest = divmod(self._iter, self.dataloader.batch_sampler.accumulation)
            if saver and steps:
                saver.save(self.runner, self.epoch, self._iter - rest, "interrupted.pth")
            if several:
                torch.distributed.barrier()  # if one exited, the launcher would end the one that saves
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame) -> None:
        """Stop where weights and counters agree: after an iteration or in a validation; at a second signal, at once."""
        alone = get_world_size() == 1
        if self.stop_signal or alone and self.runner.message_hub.get_info("loop_stage") == "val":
            raise KeyboardInterrupt
        self.stop_signal, self.stopping = signal.Signals(number).name, alone
        if is_main_process():
            when = "this iteration" if self.stopping else "the next iteration in which losses are read"
            os.write(2, f"{self.stop_signal}: stopping after {when}\n".encode())  # the logger may hold its lock

    def share_buffers(self) -> None:
        """Give all processes the same running statistics of batch normalisation, to validate and continue with."""
        if get_world_size() > 1:
            for buffer in self.runner.model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def run_iter(self, idx: int, data_batch: dict) -> None:
        """One forward and backward pass."""
        runner = self.runner
        seed = seed_of(runner.seed, self._iter, get_rank())
        torch.manual_seed(seed)  # drop path, sampled boxes
        np.random.seed(seed % 2**32)  # mixup and cutmix
        runner.call_hook("before_train_iter", batch_idx=idx, data_batch=data_batch)
        outputs = runner.model.train_step(data_batch, optim_wrapper=runner.optim_wrapper)
        runner.call_hook("after_train_iter", batch_idx=idx, data_batch=data_batch, outputs=outputs)
        self._iter += 1
        if self.stopping:
            raise Stopped


@LOOPS.register_module()
class ResumableLoop(Resumable, EpochBasedTrainLoop):
    """Training by epochs."""

    def work(self) -> torch.nn.Module:
        """mmengine's loop over epochs, with validation; also repeats a last validation that was interrupted."""
        cut = self._epoch >= self.max_epochs
        model = EpochBasedTrainLoop.run(self)
        if cut and self.runner.val_loop:
            self.runner.val_loop.run()
        return model

    def run_epoch(self) -> None:
        """One epoch, or the rest of it after resuming."""
        batches = self.dataloader.batch_sampler
        batches.epoch, batches.start = self._epoch, self._iter - self._epoch * len(batches)
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        for index, batch in enumerate(self.dataloader, batches.start):
            self.run_iter(index, batch)
        self.share_buffers()
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1


@LOOPS.register_module()
class ResumableIterations(Resumable):
    """Training by iterations, over as many epochs as needed.

    Args:
        runner, dataloader: as mmengine passes them; batches are `EndlessBatches`.
        max_iters: iterations of the run.
        val_interval: iterations between two validations; the last is always followed by one.

    Attributes:
        metrics: of the last validation.
    """

    stop_training = False  # set by mmengine's early stopping

    def __init__(self, runner, dataloader, max_iters: int, val_interval: int = 5000):
        super().__init__(runner, dataloader)
        self.max_iters, self.val_interval, self.val_begin = max_iters, val_interval, 1
        self.max_epochs = -(-max_iters // len(dataloader.batch_sampler))
        self._epoch = self._iter = 0
        self.metrics: dict[str, float] = {}

    @property
    def epoch(self) -> int:
        """Completed epochs."""
        return self._iter // len(self.dataloader.batch_sampler)

    @property
    def iter(self) -> int:
        """Completed iterations."""
        return self._iter

    def work(self) -> torch.nn.Module:
        """Train and validate; also repeats a last validation that was interrupted."""
        runner = self.runner
        runner.call_hook("before_train")
        runner.call_hook("before_train_epoch")  # as mmengine: the whole run is one long epoch to the hooks
        self.dataloader.batch_sampler.start = self._iter
        cut = self._iter >= self.max_iters
        batches = iter(() if cut else self.dataloader)
        while self._iter < self.max_iters:
            runner.model.train()
            self.run_iter(self._iter, next(batches))
            if runner.val_loop and (self._iter % self.val_interval == 0 or self._iter == self.max_iters):
                self.share_buffers()
                self.metrics = runner.val_loop.run()
        if cut and runner.val_loop:
            self.metrics = runner.val_loop.run()
        runner.call_hook("after_train_epoch")
        runner.call_hook("after_train")
        return runner.model


@MODEL_WRAPPERS.register_module()
class DistributedModel(MMDistributedDataParallel):
    """DDP that also runs on a CPU, there without `device_ids` and without synchronised batch normalisation."""

    def __init__(self, module, device_ids=None, **kwargs):
        if not torch.cuda.is_available():
            device_ids, module = None, revert_sync_batchnorm(module)  # torch refuses both on a CPU
        with warnings.catch_warnings():  # the argument that replaces it is not in torch 2.6
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            super().__init__(module=module, device_ids=device_ids, broadcast_buffers=False, **kwargs)


@RUNNERS.register_module()
class SeededRunner(Runner):
    """Runner that resumes our own checkpoints and logs its set-up in one line."""

    model: BaseModel  #: or its wrapper
    _has_loaded: bool  #: mmengine's
    data_identity: dict[str, str] | None = None  #: of a training, see `semaim.engine.resuming.check_data`

    def load_or_resume(self) -> None:
        """Continue from the checkpoint that `load_from` names, if any."""
        if self._has_loaded or not self._load_from:
            return
        checkpoint = read_checkpoint(self._load_from)
        restore_training_state(self, checkpoint, self._load_from)
        self._has_loaded = True
        self.logger.info(f"resumed from {self._load_from}, after {self.epoch} epochs and {checkpoint['step']} steps")

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        """As mmengine does, but None removes any hook, not only mmengine's own."""
        own = ("runtime_info", "timer", "sampler_seed", "logger", "param_scheduler", "checkpoint")
        super().register_default_hooks({k: v for k, v in (hooks or {}).items() if v is not None or k in own})

    def wrap_model(self, model_wrapper_cfg: dict | None, model: torch.nn.Module) -> torch.nn.Module:
        """With one process the model itself, with several `DistributedModel`, or with `fsdp` the sharded model."""
        if not self.distributed:
            return model.to(get_device())
        if self.cfg.get("fsdp"):
            self.model = model.to(get_device())
            self._init_model_weights()  # before sharding
            return shard(self.model)
        return super().wrap_model({"type": "DistributedModel"}, model)

    def _maybe_compile(self, target: str) -> None:
        """Do nothing: mmengine would compile the whole step for a config's `compile`; our networks compile blocks."""

    def _init_model_weights(self) -> None:
        """As mmengine: initialise, and give all processes the first one's weights, but not in a sharded model."""
        if not is_sharded(self.model):
            super()._init_model_weights()

    def _log_env(self, env_cfg: dict) -> None:
        on_gpu = torch.cuda.is_available()
        device = torch.cuda.get_device_name() if on_gpu else f"CPU with {torch.get_num_threads()} threads"
        self.logger.info(f"torch {torch.__version__} on {get_world_size()} x {device}; seed {self.seed}")

    def build_logger(self, *args, **kwargs):
        """mmengine's logger without the page of hooks and the experiment's name after every epoch."""
        logger = super().build_logger(*args, **kwargs)
        logger.addFilter(lambda record: not str(record.msg).startswith(("Exp name", "Hooks will be")))
        return logger
