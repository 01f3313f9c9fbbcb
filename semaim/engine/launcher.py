"""From a config to a running pretraining: checks first, then one process per GPU (or, without GPUs, on the CPU)."""

import logging
import os
import sys
import warnings
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import semaim.engine.hooks  # noqa: F401  registers what configs name
import semaim.engine.optim  # noqa: F401
import semaim.engine.pretraining  # noqa: F401
from semaim.data.folder import ResumableBatches, find_images
from semaim.engine.checkpointing import newest_checkpoint, read_checkpoint
from semaim.engine.runner import PretrainRunner, pretraining_loader
from semaim.engine.schedule import BatchPlan, plan_batch
from semaim.errors import UserError


def check_processes(processes: int | None) -> int:
    """How many processes to start here: as asked, or all visible GPUs, or one on a CPU."""
    gpus = torch.cuda.device_count()
    if processes is None:
        return gpus or 1
    if processes < 1:
        raise UserError(f"{processes} GPUs asked for: give 1 or more")
    if gpus and processes > gpus:
        raise UserError(f"{processes} GPUs asked for, {gpus} visible: give at most {gpus}")
    cores = os.cpu_count() or 1
    if not gpus and processes > cores:
        raise UserError(f"{processes} processes asked for; this machine has no GPU and {cores} CPU cores: give fewer")
    return processes


def launched() -> bool:
    """Whether torchrun, or `spawn`, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def spawn(arguments: list[str], processes: int) -> int:
    """Run this command in `processes` processes; several nodes by NNODES, NODE_RANK, MASTER_ADDR, PORT, as in mm."""
    nodes = int(os.environ.get("NNODES", 1))
    endpoint = f"{os.environ.get('MASTER_ADDR', 'localhost')}:{os.environ.get('PORT', 29500 if nodes > 1 else 0)}"
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=processes,
        run_id="semaim",
        rdzv_backend="static" if nodes > 1 else "c10d",
        rdzv_endpoint=endpoint,
        rdzv_configs={"rank": int(os.environ.get("NODE_RANK", 0)), "timeout": 900},
        max_restarts=0,
    )
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the failing process has said why
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, threads)
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        code = next(iter(error.failures.values())).exitcode
        return code if code > 0 else 1
    return 0


def plan_run(cfg: Config, processes: int) -> BatchPlan:
    """The batch arithmetic of a run; model and data are checked before anything is started."""
    network = cfg.model.network
    with torch.device("meta"):  # sizes and names are checked without memory; a teacher's weights wait
        guide = "online" if isinstance(network.get("guide"), dict) else network.get("guide", "online")
        MODELS.build({**cfg.model, "network": {**network, "guide": guide}})
    plan = plan_batch(cfg.total_batch_size, processes, cfg.images_per_gpu, cfg.base_lr)
    ResumableBatches(len(find_images(cfg.dataset.root)), plan.images, plan.accumulation, processes)
    return plan


def choose_checkpoint(cfg: Config, resume: str | None) -> str | None:
    """The checkpoint to go on from.

    Args:
        cfg: names the work folder.
        resume: None to start anew, "auto" for the newest checkpoint in the work folder, or a path.
    """
    newest = newest_checkpoint(cfg.work_dir)
    if resume is None:
        if newest:
            raise UserError(f"{newest} is there already: go on with --resume, or choose another --work-dir")
        return None
    path = newest if resume == "auto" else Path(resume)
    if path is not None:
        read_checkpoint(path)
    return None if path is None else str(path)


def pretrain(cfg: Config, resume_from: str | None = None) -> PretrainRunner:
    """Train as the config says, in this process and, where launched so, in step with its siblings."""
    distributed = launched()
    if distributed and not torch.distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # Before the runner does it: mmengine's own start-up needs CUDA.
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    world = torch.distributed.get_world_size() if distributed else 1
    plan = plan_batch(cfg.total_batch_size, world, cfg.images_per_gpu, cfg.base_lr)
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # its successor is not in torch 2.4
    # With accumulation the schedule moves before the first optimizer step, on purpose.
    warnings.filterwarnings("ignore", message="Detected call of .scheduler.step")
    torch.manual_seed(cfg.seed)

    network = cfg.model.network
    sizes = {"img_size": network.img_size, "patch_size": network.patch_size}
    loader = pretraining_loader({**cfg.dataset, **sizes}, plan, cfg.seed, cfg.num_workers)
    epochs, per_epoch = cfg.train_cfg.max_epochs, len(loader)
    cfg.optim_wrapper.optimizer.lr = plan.lr
    cfg.optim_wrapper.accumulative_counts = plan.accumulation
    scheduler = {
        **cfg.param_scheduler,
        "by_epoch": False,
        "epochs": epochs,
        "iterations_per_epoch": per_epoch,
        "accumulation": plan.accumulation,
        "peak_lr": plan.lr,
    }
    runner = PretrainRunner(
        model={**cfg.model, "compile": cfg.compile},
        work_dir=cfg.work_dir,
        train_dataloader=loader,
        train_cfg=cfg.train_cfg,
        optim_wrapper=cfg.optim_wrapper,
        param_scheduler=scheduler,
        default_hooks=cfg.default_hooks,
        custom_hooks=cfg.get("custom_hooks"),
        load_from=resume_from,
        launcher="pytorch" if distributed else "none",
        log_processor=cfg.log_processor,
        visualizer=cfg.visualizer,
        randomness={"seed": cfg.seed},
        experiment_name=str(Path(cfg.work_dir).resolve()).replace("/", "_"),
        cfg=cfg,
    )
    network = getattr(runner.model, "module", runner.model).network
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    steps = per_epoch // plan.accumulation
    warm = cfg.param_scheduler.warmup_epochs
    runner.logger.info(str(plan))
    runner.logger.info(
        f"schedule: {steps} steps/epoch x {epochs} epochs = {steps * epochs:,} steps; warm-up {warm} epochs ="
        f" {round(steps * warm):,} steps, then cosine to {cfg.param_scheduler.get('min_lr', 0):g}"
    )
    runner.logger.info(
        f"{trained:,} weights; {len(loader.dataset):,} images in {cfg.dataset.root}; order {network.order},"
        f" guide {network.guide if isinstance(network.guide, str) else 'teacher'};"
        f" target {type(network.target).__name__}"
    )
    try:
        runner.train()
    except torch.cuda.OutOfMemoryError:
        raise UserError(
            f"out of GPU memory with {plan.images} images per pass: lower --cfg-options images_per_gpu=N (accumulated"
            " steps keep the total batch), or set model.network.with_cp=True"
        ) from None
    except RuntimeError as error:
        if world > 1 and ("gloo" in str(error) or isinstance(error, torch.distributed.DistBackendError)):
            sys.exit(1)  # another process stopped, and has said why
        raise
    return runner
