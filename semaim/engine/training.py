"""Training, for every task: from a config to a finished run."""

import os
import tempfile
import uuid
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import broadcast_object_list, is_main_process
from torch.utils.data import DataLoader

import semaim.engine.hooks  # noqa: F401  registers what configs name
import semaim.engine.optim  # noqa: F401
from semaim.checkpoints import LoadReport
from semaim.checkpoints.files import read_checkpoint
from semaim.checkpoints.normalisation import Statistics
from semaim.engine.compiling import CompileTime, compile_for
from semaim.engine.launcher import join
from semaim.engine.results import record_load, record_origin, write_results
from semaim.engine.resuming import check_data
from semaim.engine.runner import SeededRunner
from semaim.engine.saving import SaveCheckpoints
from semaim.engine.schedule import BatchPlan
from semaim.engine.tracking import asked, tracked
from semaim.errors import UserError
from semaim.reading import forget
from semaim.registry import task_named


@dataclass
class Prepared:
    """What has been read and checked before a run starts, so that nothing is read twice.

    Attributes:
        task: of the config.
        statistics: mean and standard deviation of its images, as in the config.
        train, val: the images, as a data set of ours or of OpenMMLab's built by the task; None if the task has none.
        lines: what the checks found, for the log.
        recorded: what is already known about the run, for results.json.
    """

    task: "RunnableTask"
    statistics: Statistics
    train: Any = None
    val: Any = None
    lines: list[str] = field(default_factory=list)
    recorded: dict = field(default_factory=dict)


@dataclass(kw_only=True)
class PreparedTraining(Prepared):
    """`Prepared` for a training.

    Attributes:
        plan: the batch arithmetic.
    """

    plan: BatchPlan


@runtime_checkable
class RunnableTask(Protocol):
    """What `train` and `semaim.engine.testing.test` require of a task; `ImageTask` and `DenseTask` provide it.

    Attributes:
        title, trains: as in `semaim.registry.Task`.
        instead: what may be measured in place of a checkpoint, in words.
    """

    title: ClassVar[str]
    trains: ClassVar[bool]
    instead: str

    def prepare_training(self, cfg: Config, processes: int, resume_from: str | None, check: bool) -> PreparedTraining:
        """See `prepare_training`."""

    def training_loader(self, cfg: Config, run: PreparedTraining) -> DataLoader:
        """Shuffled batches of this process."""

    def identity(self, images: Any) -> str:
        """A hash of the names and sizes of the files of a split, see `semaim.data.identity`."""

    def model_config(self, cfg: Config) -> dict:
        """The config from which the runner builds the model."""

    def schedule(self, cfg: Config, run: PreparedTraining, loader: DataLoader) -> dict:
        """mmengine's arguments for length and learning rate."""

    def validation(self, cfg: Config, run: Prepared, mode: str) -> dict:
        """mmengine's arguments for a validation ("val") or test ("test")."""

    def describe(self, cfg: Config, run: PreparedTraining, loader: DataLoader, model: Any) -> list[str]:
        """Log lines that describe the run."""

    def cautions(self, run: PreparedTraining, model: Any) -> list[str]:
        """Warnings for the log."""

    def load_encoder(self, cfg: Config, model: Any, path: str) -> LoadReport:
        """Load the pretrained encoder of a checkpoint into the model."""

    def trained_figures(self, cfg: Config, runner: SeededRunner) -> tuple[dict[str, float], dict]:
        """The figures of the last validation, and further values for results.json."""

    def prepare_test(self, cfg: Config, weights: str, check: bool) -> Prepared:
        """See `semaim.engine.testing.prepare_test`."""

    def measure(self, cfg: Config, run: Prepared, weights: str) -> dict[str, float]:
        """The metrics of a checkpoint, which are also written to results.json."""


def runnable_task(cfg: Config) -> RunnableTask:
    """The task of a config; `UserError` if there is none of that name, or it cannot run."""
    task = task_named(cfg.get("task"), f"{cfg.filename or 'the config'}: task")
    if not isinstance(task, RunnableTask):
        raise UserError(f"task {task.name}: derive {type(task).__name__} from ImageTask, FeatureTask or DenseTask")
    return task


def check_sockets(cfg: Config) -> None:
    """`UserError` if a loader's workers could not hand over a batch; they would drop it, and the run wait for ever.

    They do so through sockets in Python's folder for temporary files, whose path Linux limits to 107 bytes.
    """
    folder = tempfile.gettempdir()
    longest = os.path.join(folder, "pymp-12345678", "listener-12345678")  # as multiprocessing names it
    if cfg.get("num_workers") and (over := len(os.fsencode(longest)) - 107) > 0:
        raise UserError(
            f"TMPDIR, {folder}, is too long by {over} bytes for the sockets of data loaders' workers: set it to a"
            " shorter path, or --cfg-options num_workers=0"
        )


def prepare_training(
    cfg: Config, processes: int, resume_from: str | None = None, check: bool = True
) -> PreparedTraining:
    """Build the data of a run and check what can be checked in advance; the config is completed in place.

    Args:
        cfg: of the run.
        processes: number of processes it will have.
        resume_from: this run's own checkpoint to resume from.
        check: check for everything that would end the run later; else the parent process has done so.

    Raises:
        UserError: something is wrong that would end the run, or silently spoil it.
    """
    check_sockets(cfg)
    asked(cfg)
    task = runnable_task(cfg)
    if not task.trains:
        raise UserError(f"{cfg.filename} measures a checkpoint ({task.title}): tools/test.py {cfg.filename} FILE")
    return task.prepare_training(cfg, processes, resume_from, check)


def train(
    cfg: Config,
    resume_from: str | None = None,
    notes: Sequence[str] = (),
    prepared: PreparedTraining | None = None,
    strict_data: bool = False,
    rescue_dir: str | None = None,
) -> SeededRunner:
    """Train as the config says, in this process, together with any others of a distributed launch.

    Args:
        cfg: of the run.
        resume_from: this run's own checkpoint to resume from.
        notes: lines for the log.
        prepared: result of `prepare_training` for this config, in this process; None to prepare here.
        strict_data: `UserError` if a resumed run's data have changed since its checkpoint; else a warning.
        rescue_dir: folder for the run's state if the work folder cannot be written; None for none.
    """
    world = join()
    # With accumulated steps, the schedule moves before the first optimizer step.
    warnings.filterwarnings("ignore", message="Detected call of .scheduler.step")
    run = prepared or prepare_training(cfg, world, resume_from, check=False)
    task, plan = run.task, run.plan
    data = identities(run) if is_main_process() else {}
    changed = check_data(resume_from, data, strict_data) if data and resume_from else None
    torch.manual_seed(cfg.seed)
    loader = task.training_loader(cfg, run)
    cfg.optim_wrapper.optimizer.lr = plan.lr
    cfg.optim_wrapper.accumulative_counts = plan.accumulation
    record_origin(cfg, cfg.get("pretrained"), resume_from)
    runner = make_runner(
        cfg,
        model=task.model_config(cfg),
        train_dataloader=loader,
        optim_wrapper=cfg.optim_wrapper,
        load_from=resume_from,
        **task.schedule(cfg, run, loader),
        **(task.validation(cfg, run, "val") if run.val is not None else {}),
    )
    saver = next((hook for hook in runner.hooks if isinstance(hook, SaveCheckpoints)), None)
    if saver:
        saver.rescue_dir = rescue_dir
    model = getattr(runner.model, "module", runner.model)
    log = runner.logger.info
    if compile_for(cfg, model, runner.train_loop.max_iters, torch.device(get_device()), runner.logger):
        runner.register_hook(CompileTime())
    for line in (*notes, str(plan), *task.describe(cfg, run, loader, model)):
        log(line)
    for line in (*task.cautions(run, model), *([changed] if changed else [])):
        runner.logger.warning(line)
    if resume_from is None and cfg.get("pretrained"):
        log(str(record_load(task.load_encoder(cfg, model, cfg.pretrained), cfg, runner.cfg)))
    elif resume_from is None and run.val is not None:
        log("no --pretrained checkpoint: training starts from random weights")
    for line in run.lines:
        log(line)
    before = read_checkpoint(resume_from, mmap=True).get("saving", {}).get("run") if resume_from else None
    name = before or (saver.saving.run if saver else uuid.uuid4().hex)
    forget()
    # After an error of another process it is that one which saves: its files record the same.
    shared = [data, runner.cfg.to_dict().get("origin")]
    broadcast_object_list(shared)
    runner.data_identity, origin = shared
    for config in (cfg, runner.cfg) if origin else ():
        config.origin = origin
    with tracked(runner, cfg, name, resumed=resume_from is not None) as final:
        runner.train()
        if run.val is not None:
            metrics, more = task.trained_figures(cfg, runner)
            write_results(cfg, metrics, len(run.train), len(run.val), cfg.get("pretrained"), **more, **run.recorded)
            final.update(metrics)
    return runner


def identities(run: PreparedTraining) -> dict[str, str]:
    """Split of the data -> hash of its files."""
    splits = {"train": run.train, "val": run.val}
    return {name: run.task.identity(images) for name, images in splits.items() if images is not None}


def make_runner(cfg: Config, **parts) -> SeededRunner:
    """The runner of a training or a test; `parts` are the arguments of mmengine's runner that depend on it."""
    training = "train_dataloader" in parts
    return SeededRunner(
        work_dir=cfg.work_dir,
        default_hooks=cfg.default_hooks if training else {**cfg.default_hooks, "checkpoint": None},
        custom_hooks=cfg.get("custom_hooks") if training else None,
        launcher="pytorch" if torch.distributed.is_initialized() else "none",
        default_scope=cfg.default_scope,
        log_processor=cfg.log_processor,
        visualizer=cfg.visualizer,
        randomness={"seed": cfg.seed},
        experiment_name=str(Path(cfg.work_dir).resolve()).replace("/", "_") + ("" if training else "_test"),
        cfg=cfg,
        **parts,
    )
