"""mmengine's Runner with our checkpoints, a loop that resumes inside an epoch, and DDP that also runs on a CPU."""

import atexit
import datetime
import multiprocessing
import os
import re
import signal
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import mmengine.device.utils
import torch
from mmengine.device import get_device
from mmengine.dist import broadcast_object_list, get_rank, get_world_size, is_main_process
from mmengine.model import BaseModel, MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.registry import LOOPS, MODEL_WRAPPERS, RUNNERS
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.utils.data import DataLoader, Dataset, default_collate

from semaim.checkpoints.files import read_checkpoint
from semaim.data.folder import EndlessBatches, PretrainImages, ResumableBatches
from semaim.data.labelled import LabelledImages
from semaim.engine.full_disk import Tolerant, go_on
from semaim.engine.hooks import read_outputs
from semaim.engine.launcher import end_with_parent
from semaim.engine.saving import restore_training_state
from semaim.engine.schedule import BatchPlan
from semaim.engine.sharding import is_sharded, shard
from semaim.engine.stopping import Resumable, Validating
from semaim.engine.watching import STOPS
from semaim.errors import UserError

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
    # What a terminal or a scheduler sends to all processes is for the main process, which ends its workers when it has
    # saved. A worker outside of the group would outlive a killed main process and wait forever.
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    if end_with_parent(signal.SIGKILL):
        os.setpgid(0, 0)


@atexit.register  # before multiprocessing's, which sends SIGTERM to the workers and waits for them
def _end_workers() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report each one as a failure
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


@LOOPS.register_module()
class ResumableLoop(Resumable, EpochBasedTrainLoop):
    """Training by epochs.

    Args:
        max_epochs: epochs of the run.
        val_interval: epochs between two validations.
    """

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
        for index, batch in enumerate(self.batches(), batches.start):
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
        batches = iter(()) if cut else self.batches()
        while self._iter < self.max_iters:
            runner.model.train()
            self.run_iter(self._iter, next(batches))
            if runner.val_loop and (self._iter % self.val_interval == 0 or self._iter == self.max_iters):
                self.share_buffers()
                read_outputs(runner)  # all together: a signal in the validation may have one process save alone
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


STAMPED, STAMP = "%Y%m%d_%H%M%S", re.compile(r"\d{8}_\d{6}")  #: mmengine's name of a log's folder


@RUNNERS.register_module()
class SeededRunner(Runner):
    """Runner that resumes our own checkpoints and logs its set-up in one line."""

    model: BaseModel  #: or its wrapper
    _has_loaded: bool  #: mmengine's
    _timestamp: str  #: mmengine's
    data_identity: dict[str, str] | None = None  #: of a training, see `semaim.engine.resuming.check_data`

    def setup_env(self, env_cfg: dict) -> None:
        """As mmengine; but the name of the log's folder is later than those there, even if the clock was put back.

        The parts of a run are read in the order of these names.
        """
        super().setup_env(env_cfg)
        known = [path.name for path in Path(self.work_dir).glob("*_*") if STAMP.fullmatch(path.name)]
        if is_main_process() and known and max(known) >= self._timestamp:
            newest = datetime.datetime.strptime(max(known), STAMPED)
            self._timestamp = (newest + datetime.timedelta(seconds=1)).strftime(STAMPED)
        stamps = [self._timestamp]
        broadcast_object_list(stamps)
        self._timestamp = stamps[0]

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
        self.register_hook(Validating())

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
        return go_on(logger)

    def dump_config(self) -> None:
        """mmengine's; `UserError` if there is no space."""
        try:
            super().dump_config()
        except OSError as error:
            raise UserError(f"cannot write to the work folder {self.work_dir}: {error.strerror}") from None

    def build_visualizer(self, visualizer=None):
        """mmengine's, whose writers do not end a run when the disk is full."""
        built = super().build_visualizer(visualizer)
        built._vis_backends = {name: Tolerant(backend) for name, backend in built._vis_backends.items()}
        return built
