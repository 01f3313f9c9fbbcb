"""Shared by the tasks on image folders: pretraining, fine-tuning, linear probing."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import BaseLoop
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

import semaim.engine.classification  # noqa: F401  registers what configs name
import semaim.engine.pretraining  # noqa: F401
from semaim import checkpoints
from semaim.checkpoints.consumers import NEW_IN_CLASSIFIERS
from semaim.data.folder import PretrainImages, ResumableBatches
from semaim.data.identity import identity_of
from semaim.data.labelled import LabelledImages, check_classes, evaluation_transform
from semaim.engine.browsing import Browsed, browse_images
from semaim.engine.encoders import head_of, load_classifier, load_encoder, settle_images
from semaim.engine.network import NetworkModel
from semaim.engine.results import record_load, record_origin, write_results
from semaim.engine.runner import SeededRunner, evaluation_loader, training_loader
from semaim.engine.schedule import describe, plan_batch, schedule_of
from semaim.engine.training import Prepared, PreparedTraining, make_runner
from semaim.errors import UserError
from semaim.outcomes import write_outcomes
from semaim.registry import Task, build_model


class ImageTask(Task):
    """Trains by epochs on a folder of images, `cfg.dataset`, with the suite's own models.

    Attributes:
        labelled: whether the images have classes; if so, there are validation images and the model is a classifier.
    """

    keys = {
        "dataset": "the images and their augmentation",
    }
    instead = ""
    labelled = True

    def enter(self, cfg: Config) -> None:
        """Register the types that the config names."""
        init_default_scope(cfg.default_scope)

    def browse(self, cfg: Config, count: int) -> Browsed:
        """See `Task.browse`."""
        self.enter(cfg)
        statistics = settle_images(cfg, cfg.get("pretrained"))
        return browse_images(build_datasets(cfg, self.labelled)[0], statistics, count)

    # Training

    def prepare_training(self, cfg: Config, processes: int, resume_from: str | None, check: bool) -> PreparedTraining:
        """See `semaim.engine.training.prepare_training`."""
        self.enter(cfg)
        statistics = settle_images(cfg, cfg.get("pretrained"), resume_from)
        model = empty_model(cfg) if check else None
        plan = plan_batch(cfg.total_batch_size, processes, cfg.images_per_gpu, cfg.base_lr)
        if (cfg.model.get("mixup") or cfg.model.get("cutmix")) and plan.images % 2:
            raise UserError(f"mixup pairs the images of a pass, and {plan.images} is odd: set an even images_per_gpu")
        train, val = build_datasets(cfg, self.labelled)
        if model is not None:  # it is to be checked
            ResumableBatches(len(train), plan.images, plan.accumulation, processes)
            if cfg.get("pretrained") and resume_from is None:
                if self.labelled:  # the number of classes is known now
                    model = empty_model(cfg)
                fit_encoder(cfg, model.network, cfg.pretrained)
        recorded = {"held_out": val.held_out} if val is not None and val.held_out else {}
        return PreparedTraining(self, statistics, train, val, recorded=recorded, plan=plan)

    def training_loader(self, cfg: Config, run: PreparedTraining) -> DataLoader:
        """Shuffled batches of this process."""
        return training_loader(run.train, run.plan, cfg.seed, cfg.num_workers)

    def identity(self, images: PretrainImages | LabelledImages) -> str:
        """A hash of the names and sizes of the files of a split."""
        return identity_of(map(os.fsdecode, images.paths), images.root)

    def model_config(self, cfg: Config) -> dict:
        """The config from which the runner builds the model."""
        return cfg.model

    def schedule(self, cfg: Config, run: PreparedTraining, loader: DataLoader) -> dict:
        """mmengine's arguments for length and learning rate."""
        steps = cfg.train_cfg.max_epochs * (len(loader) // run.plan.accumulation)
        return {"train_cfg": cfg.train_cfg, "param_scheduler": schedule_of(cfg.param_scheduler, run.plan, steps)}

    def validation(self, cfg: Config, run: Prepared, mode: str) -> dict:
        """mmengine's arguments for a validation ("val") or test ("test")."""
        batch = run.plan.images if isinstance(run, PreparedTraining) else cfg.images_per_gpu
        return {
            f"{mode}_dataloader": evaluation_loader(run.val, batch, cfg.num_workers),
            f"{mode}_cfg": {"type": "ValLoop" if mode == "val" else "TestLoop"},
            f"{mode}_evaluator": {"type": "ClassAccuracy"},
        }

    def describe(self, cfg: Config, run: PreparedTraining, loader: DataLoader, model: NetworkModel) -> list[str]:
        """Log lines that describe the run."""
        epochs, steps = cfg.train_cfg.max_epochs, len(loader) // run.plan.accumulation
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return [
            f"schedule: {steps} steps/epoch x {epochs} epochs = {steps * epochs:,} steps;"
            f" {describe(cfg.param_scheduler, steps * epochs, epochs)}",
            f"{model.describe()}; computed in {model.computed_in(get_device())}",
            f"images normalised with {run.statistics}",
            f"{trained:,} trained weights; {len(run.train):,} images in {run.train.root}"
            + (f", {len(run.val):,} for validation{held_out(run.val)}" if run.val is not None else ""),
        ]

    def cautions(self, run: PreparedTraining, model: nn.Module) -> list[str]:
        """Warnings for the log."""
        return []

    def load_encoder(self, cfg: Config, model: NetworkModel, path: str) -> checkpoints.LoadReport:
        """Load the encoder of a checkpoint of any dialect into the model."""
        return load_encoder(model.network, path, cfg) or load_pretrained(
            model.network, path, cfg.get("allow_partial", False)
        )

    def trained_figures(self, cfg: Config, runner: SeededRunner) -> tuple[dict[str, float], dict]:
        """The figures of the last validation, and further values for results.json."""
        if is_main_process():
            write_hits(cfg, runner.val_loop)
        hub = runner.message_hub
        return {name: hub.get_scalar(f"val/{name}").current() for name in ("top1", "top5", "loss")}, {
            "epochs": runner.epoch,
            "precision": getattr(runner.model, "module", runner.model).computed_in(get_device()),
        }

    # Testing

    def prepare_test(self, cfg: Config, weights: str, check: bool) -> Prepared:
        """See `semaim.engine.testing.prepare_test`."""
        if not self.labelled:
            raise UserError("this config pretrains: evaluate with one of semaim/configs/{knn,linear,finetune}")
        self.enter(cfg)
        statistics = settle_images(cfg, weights, whole=True)
        head, known = head_of(weights)
        if head is None:
            problem = f"{weights} has no classifier"
            raise UserError(f"{problem}: fine-tune it first (tools/train.py CONFIG --pretrained FILE)")
        val = build_validation(cfg)
        cfg.model.network.num_classes = len(val.classes)
        if len(head) != len(val.classes):
            raise UserError(f"{weights} knows {len(head)} classes, {cfg.dataset.root} has {len(val.classes)}")
        if known and known != val.classes:
            other = next(name for name, ours in zip(known, val.classes, strict=True) if name != ours)
            raise UserError(f"{weights} knows the class {other}, which {cfg.dataset.root} lacks or has elsewhere")
        return Prepared(self, statistics, val=val, recorded={"held_out": val.held_out} if val.held_out else {})

    def measure(self, cfg: Config, run: Prepared, weights: str) -> dict[str, float]:
        """Top-1, top-5 and loss of a fine-tuned or probed checkpoint on the validation images."""
        record_origin(cfg, weights, whole=True)
        runner = make_runner(cfg, model=cfg.model, **self.validation(cfg, run, "test"))
        model = getattr(runner.model, "module", runner.model)
        report = load_trained(model.network, weights, cfg.get("allow_partial", False))
        runner.logger.info(str(report))
        runner.logger.info(f"images normalised with {run.statistics}")
        record_load(report, cfg)
        metrics = runner.test()
        if is_main_process():
            write_hits(cfg, runner.test_loop)
        recorded = {"stage": "Classification", "precision": model.computed_in(get_device())}
        write_results(cfg, metrics, None, len(run.val), weights, **recorded, **run.recorded)
        return metrics


def held_out(val: LabelledImages) -> str:
    """How the validation images came about, where the data have no validation split; else empty."""
    return f" ({val.held_out:.0%} of each class, held out by the images' names)" if val.held_out else ""


def load_trained(network: nn.Module, weights: str, partial: bool) -> checkpoints.LoadReport:
    """Load all weights of a trained classifier; `UserError` if they do not fit, `partial` as by --allow-partial."""
    report = load_classifier(network, weights) or checkpoints.load(network, weights, partial=True)
    if report.missing:
        raise UserError(
            f"{weights} lacks {', '.join(report.missing[:3])}, which this config's classifier has: evaluate it with the"
            " config of its training"
        )
    if not partial:
        report.refuse()
    return report


def write_hits(cfg: Config, loop: BaseLoop) -> None:
    """Write `outcomes.npz`: which images of a loop's last evaluation were classified right."""
    [metric] = loop.evaluator.metrics
    write_outcomes(Path(cfg.work_dir), loop.dataloader.dataset.names(), {"top1": metric.hits["top1"]})


def build_datasets(cfg: Config, labelled: bool = True) -> tuple[PretrainImages | LabelledImages, LabelledImages | None]:
    """The training images, and for labelled data the validation images; sets the config's number of classes."""
    network = cfg.model.network
    if not labelled:
        sizes = {"img_size": network.img_size, "patch_size": network.patch_size}
        return DATASETS.build({**cfg.dataset, **sizes, "seed": cfg.seed}), None
    train: LabelledImages = DATASETS.build(
        {**cfg.dataset, "img_size": network.img_size, "seed": cfg.seed, "split": "train"}
    )
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


def build_validation(cfg: Config) -> LabelledImages:
    """The validation images of labelled data, with the evaluation transform."""
    img_size = cfg.model.network.img_size
    return DATASETS.build({**cfg.dataset, "img_size": img_size, "seed": cfg.seed, "split": "val", "augment": None})


def evaluation_of(cfg: Config) -> Callable[[Image.Image], Tensor]:
    """The transform of validation images, without the images: PIL image -> normalised floats (3, S, S)."""
    names = ("crop_pct", "mean", "std", "crop_mode", "interpolation")
    given = {name: cfg.dataset[name] for name in names if cfg.dataset.get(name) is not None}
    return evaluation_transform(cfg.model.network.img_size, **given)


def empty_model(cfg: Config) -> NetworkModel:
    """The config's model on the meta device: its sizes and names are checked without memory."""
    network = dict(cfg.model.network)
    if isinstance(network.get("guide"), dict):
        network["guide"] = "online"  # do not load a teacher's weights yet
    if "num_classes" in network:
        network["num_classes"] = network["num_classes"] or 1  # the data determines it later
    with torch.device("meta"):
        return build_model({**cfg.model, "network": network})


def fit_encoder(cfg: Config, network: nn.Module, path: str) -> checkpoints.LoadReport:
    """`UserError` if the encoder of a checkpoint does not fit a network, which may be on the meta device."""
    if report := load_encoder(network, path, cfg):
        return report
    found = checkpoints.read(path)
    return checkpoints.fit(network, found, NEW_IN_CLASSIFIERS, cfg.get("allow_partial", False))[0]


def load_pretrained(network: nn.Module, path: str | Path, partial: bool = False) -> checkpoints.LoadReport:
    """Load the encoder of a checkpoint of any dialect into a network with any other parts; see `checkpoints.load`."""
    return checkpoints.load(network, path, NEW_IN_CLASSIFIERS, partial)
