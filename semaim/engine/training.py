"""From a config to a finished run, for every stage on images: pretraining, fine-tuning, linear probing."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS
from torch.utils.data import Dataset

import semaim.engine.classification  # noqa: F401  registers what configs name
import semaim.engine.hooks  # noqa: F401
import semaim.engine.optim  # noqa: F401
import semaim.engine.pretraining  # noqa: F401
from semaim import checkpoints
from semaim.checkpoints.consumers import NEW_IN_CLASSIFIERS
from semaim.checkpoints.normalisation import choose, settle
from semaim.data.folder import ResumableBatches
from semaim.data.labelled import check_classes
from semaim.engine.launcher import join
from semaim.engine.results import record_load, record_origin, write_results
from semaim.engine.runner import SeededRunner, evaluation_loader, training_loader
from semaim.engine.schedule import BatchPlan, describe, plan_batch, schedule_of
from semaim.errors import UserError


def build_datasets(cfg: Config) -> tuple[Dataset, Dataset | None]:
    """The training images, and for labelled data the validation images; fills in the number of classes."""
    network = cfg.model.network
    if cfg.model.type == "Pretraining":
        sizes = {"img_size": network.img_size, "patch_size": network.patch_size}
        return DATASETS.build({**cfg.dataset, **sizes, "seed": cfg.seed}), None
    train = DATASETS.build({**cfg.dataset, "img_size": network.img_size, "seed": cfg.seed, "split": "train"})
    val = build_validation(cfg)
    check_classes(train.classes, val.classes, cfg.dataset.root)
    if network.num_classes is None:
        network.num_classes = len(train.classes)
    if network.num_classes not in (0, len(train.classes)):
        raise UserError(
            f"{cfg.dataset.root} has {len(train.classes)} classes, the config {network.num_classes}: set --cfg-options"
            " model.network.num_classes=None to take as many as there are"
        )
    return train, val


def build_validation(cfg: Config) -> Dataset:
    """The validation images of labelled data, as they are measured on."""
    img_size = cfg.model.network.img_size
    return DATASETS.build({**cfg.dataset, "img_size": img_size, "seed": cfg.seed, "split": "val", "augment": None})


def plan_run(cfg: Config, processes: int) -> BatchPlan:
    """The batch arithmetic of a run; model, data and pretrained weights are checked before anything is started."""
    network = dict(cfg.model.network)
    if isinstance(network.get("guide"), dict):
        network["guide"] = "online"  # a teacher's weights wait
    if "num_classes" in network:
        network["num_classes"] = network["num_classes"] or 1  # the data will tell
    with torch.device("meta"):  # sizes and names are checked without memory
        MODELS.build({**cfg.model, "network": network})
    plan = plan_batch(cfg.total_batch_size, processes, cfg.images_per_gpu, cfg.base_lr)
    if (cfg.model.get("mixup") or cfg.model.get("cutmix")) and plan.images % 2:
        raise UserError(f"mixup pairs the images of a pass, and {plan.images} is odd: set an even images_per_gpu")
    choose(cfg, cfg.get("pretrained"))
    train, _ = build_datasets(cfg)
    ResumableBatches(len(train), plan.images, plan.accumulation, processes)
    if cfg.get("pretrained") and processes > 1:  # a single process says itself what is wrong
        load_pretrained(MODELS.build(cfg.model).network, cfg.pretrained, cfg.get("allow_partial", False))
    return plan


def model_config(cfg: Config) -> dict:
    """`cfg.model` as it is built: with `compile`, and with the statistics of images that come as pixels."""
    config = {**cfg.model, "compile": cfg.compile}
    if cfg.model.type == "Pretraining":
        config |= {"mean": cfg.dataset.get("mean"), "std": cfg.dataset.get("std")}
    return config


def load_pretrained(network: torch.nn.Module, path: str, partial: bool = False) -> checkpoints.LoadReport:
    """The encoder of a checkpoint of any dialect into a network, whatever stands around it; see `checkpoints.load`."""
    return checkpoints.load(network, path, NEW_IN_CLASSIFIERS, partial)


def set_data_root(cfg: Config, root: str) -> None:
    """Read the images from another folder."""
    cfg.dataset.root = root


def train(cfg: Config, resume_from: str | None = None, notes: Sequence[str] = ()) -> SeededRunner:
    """Train as the config says, in this process and, where launched so, in step with its siblings.

    Args:
        cfg: of the run.
        resume_from: a checkpoint of this very run to go on from.
        notes: lines for the log.
    """
    world = join()
    plan = plan_batch(cfg.total_batch_size, world, cfg.images_per_gpu, cfg.base_lr)
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # its successor is not in torch 2.6
    # With accumulation the schedule moves before the first optimizer step, on purpose.
    warnings.filterwarnings("ignore", message="Detected call of .scheduler.step")
    torch.manual_seed(cfg.seed)

    statistics = settle(cfg, resume_from or cfg.get("pretrained"))
    images, val = build_datasets(cfg)
    loader = training_loader(images, plan, cfg.seed, cfg.num_workers)
    epochs, per_epoch = cfg.train_cfg.max_epochs, len(loader)
    cfg.optim_wrapper.optimizer.lr = plan.lr
    cfg.optim_wrapper.accumulative_counts = plan.accumulation
    steps = per_epoch // plan.accumulation
    validation = {}
    if val is not None:
        validation = {
            "val_dataloader": evaluation_loader(val, plan.images, cfg.num_workers),
            "val_cfg": {"type": "ValLoop"},
            "val_evaluator": {"type": "ClassAccuracy"},
        }
    record_origin(cfg, cfg.get("pretrained"), resume_from)
    runner = SeededRunner(
        model=model_config(cfg),
        work_dir=cfg.work_dir,
        train_dataloader=loader,
        train_cfg=cfg.train_cfg,
        **validation,
        optim_wrapper=cfg.optim_wrapper,
        param_scheduler=schedule_of(cfg.param_scheduler, plan, steps * epochs),
        default_hooks=cfg.default_hooks,
        custom_hooks=cfg.get("custom_hooks"),
        load_from=resume_from,
        launcher="pytorch" if world > 1 else "none",
        default_scope=cfg.default_scope,
        log_processor=cfg.log_processor,
        visualizer=cfg.visualizer,
        randomness={"seed": cfg.seed},
        experiment_name=str(Path(cfg.work_dir).resolve()).replace("/", "_"),
        cfg=cfg,
    )
    model = getattr(runner.model, "module", runner.model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log = runner.logger.info
    for note in notes:
        log(note)
    log(str(plan))
    log(
        f"schedule: {steps} steps/epoch x {epochs} epochs = {steps * epochs:,} steps;"
        f" {describe(cfg.param_scheduler, steps * epochs, epochs)}"
    )
    log(model.describe())
    log(f"images normalised with {statistics}")
    log(
        f"{trained:,} trained weights; {len(images):,} images in {images.root}"
        + (f", {len(val):,} to validate on" if val is not None else "")
    )
    if resume_from is None and cfg.get("pretrained"):
        report = load_pretrained(model.network, cfg.pretrained, cfg.get("allow_partial", False))
        log(str(record_load(report, cfg, runner.cfg)))
    elif resume_from is None and val is not None:
        log("no --pretrained checkpoint: training starts from random weights")
    runner.train()
    if val is not None:
        scalars = {name: runner.message_hub.get_scalar(f"val/{name}").current() for name in ("top1", "top5", "loss")}
        write_results(cfg, scalars, len(images), len(val), cfg.get("pretrained"), epochs=runner.epoch)
    return runner
