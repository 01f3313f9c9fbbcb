"""Tasks on mmdet's and mmseg's models: preparation, training and testing."""

from collections.abc import Mapping

from mmengine.config import Config
from mmengine.dataset import BaseDataset, pseudo_collate
from mmengine.dist import is_main_process
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from torch import nn
from torch.utils.data import DataLoader

from semaim import checkpoints
from semaim.checkpoints.consumers import load_backbone
from semaim.data.folder import EndlessBatches
from semaim.data.identity import identity_of
from semaim.engine import dense, own_data
from semaim.engine.browsing import Browsed, browse_dense
from semaim.engine.classes import left_out, left_out_lines
from semaim.engine.encoders import load_encoder, settle_images
from semaim.engine.precision import check_precision
from semaim.engine.results import record_load, record_origin, write_results
from semaim.engine.runner import SeededRunner, endless_loader, prepare_worker
from semaim.engine.schedule import BatchPlan, describe, plan_batch, schedule_of
from semaim.engine.training import Prepared, PreparedTraining, make_runner
from semaim.errors import UserError
from semaim.registry import Task

SPLITS = ("train_dataset", "val_dataset")


class DenseTask(Task):
    """Trains by iterations on a data set of mmdet or mmseg, with one of their models on our backbone."""

    keys = {
        "train_dataset": "the data set trained on, as in mmdet and mmseg",
        "val_dataset": "the data set validated on",
        "val_evaluator": "the metric",
        "keep_classes": "the categories of a COCO file to detect; the others are left out, and counted",
        "base_batch_size": "images that base_lr belongs to",
        "test_pipeline": "how an image is prepared for prediction",
        "tta_ratios": "scales, relative to the validation's, that --tta averages over, each also flipped; below 1 is 1",
        "tta": "whether to do so by default",
        "own_data": "what --data-root, --classes and --data have found (docs/own_data.md); {} in a config for own data",
        "most_ignored": "largest share of a split's pixels that may be unlabelled; a larger one is an error",
    }
    roots = ("train_dataset.data_root", "val_dataset.data_root")
    instead = ""
    averages = True

    def enter(self, cfg: Config) -> None:
        """Register the types that the config names."""
        dense.enter(cfg)

    def check_plan(self, cfg: Config, plan: BatchPlan, processes: int) -> None:
        """`UserError` for a batch that the model cannot train with."""

    def describe_data(self, cfg: Config, sets: Mapping[str, BaseDataset]) -> list[str]:
        """What the labels of these splits contain, for the log; `UserError` if they do not suit this config."""
        return []

    def keep_outcomes(self, cfg: Config, images: BaseDataset, metric: BaseMetric) -> None:
        """Write what this metric has found for each of these validation images; here nothing."""

    def data(
        self, cfg: Config, splits: tuple[str, ...], check: bool = True
    ) -> tuple[tuple[BaseDataset, ...], list[str]]:
        """The images of these splits, and log lines about their labels; `UserError` for what would spoil a training."""
        if check:
            dense.check_classes_of(cfg, splits)
        sets = dense.build_data(cfg, splits)
        if not is_main_process():
            return sets, []
        named = dict(zip(splits, sets, strict=True))
        found = own_data.lines(cfg, {split: len(images) for split, images in named.items()})
        return sets, [*found, *self.describe_data(cfg, named)]

    def browse(self, cfg: Config, count: int) -> Browsed:
        """See `Task.browse`."""
        self.enter(cfg)
        return browse_dense(
            dense.SeededImages(dense.build(cfg.train_dataset, DATASETS, "train_dataset"), cfg.seed), count
        )

    # Training

    def prepare_training(self, cfg: Config, processes: int, resume_from: str | None, check: bool) -> PreparedTraining:
        """See `semaim.engine.training.prepare_training`."""
        self.enter(cfg)
        plan = plan_batch(cfg.total_batch_size, processes, cfg.images_per_gpu, cfg.base_lr, cfg.base_batch_size)
        statistics = settle_images(cfg, cfg.get("pretrained"), resume_from)
        if check:
            self.check_plan(cfg, plan, processes)
            check_precision("optim_wrapper", "bf16", cfg.optim_wrapper.get("cpu_precision", "fp32"))
        (train, val), described = self.data(cfg, SPLITS, check)
        if check:
            dense.check_fit(cfg, val)
            EndlessBatches(len(train), plan.images, plan.accumulation, processes)
            model = dense.build(cfg.model, MODELS, "model")
            dense.check_positions(model)
            if getattr(model.backbone, "init_cfg", None):
                raise UserError(
                    "model.backbone.init_cfg is for mmdet's and mmseg's own runners: give --pretrained FILE, which is"
                    " recorded"
                )
            if cfg.get("pretrained") and resume_from is None:
                self.load_encoder(cfg, model, cfg.pretrained)
        counts = left_out(cfg, *SPLITS)
        recorded = {"data": cfg.train_dataset.data_root, "iterations": cfg.train_cfg.max_iters, **counts}
        recorded |= own_data.recorded(cfg)
        lines = [*left_out_lines(counts), *described]
        return PreparedTraining(self, statistics, train, val, lines, recorded, plan=plan)

    def training_loader(self, cfg: Config, run: PreparedTraining) -> DataLoader:
        """Shuffled batches of this process, epoch after epoch."""
        images = dense.SeededImages(run.train, cfg.seed)
        return endless_loader(images, run.plan, cfg.seed, cfg.num_workers, pseudo_collate)

    def identity(self, images: BaseDataset) -> str:
        """A hash of the names and sizes of the annotation file, images and label maps of a split."""
        return identity_of(dense.files_of(images), images.data_root or "")

    def model_config(self, cfg: Config) -> dict:
        """The config from which the runner builds the model."""
        return cfg.model

    def schedule(self, cfg: Config, run: PreparedTraining, loader: DataLoader) -> dict:
        """mmengine's arguments for length and learning rate, in iterations."""
        accumulation = run.plan.accumulation
        scaled = {key: cfg.train_cfg[key] * accumulation for key in ("max_iters", "val_interval")}
        schedule = schedule_of(cfg.param_scheduler, run.plan, cfg.train_cfg.max_iters)
        return {"train_cfg": {**cfg.train_cfg, **scaled}, "param_scheduler": schedule}

    def validation(self, cfg: Config, run: Prepared, mode: str) -> dict:
        """mmengine's arguments for a validation ("val") or test ("test") on `val_dataset`."""
        # Test-time augmentation has another pipeline than the images that were checked.
        images = dense.build(cfg.val_dataset, DATASETS, "val_dataset") if cfg.get("tta") else run.val
        loader = {
            "batch_size": 1,
            "num_workers": cfg.num_workers,
            "persistent_workers": cfg.num_workers > 0,
            "worker_init_fn": {"type": prepare_worker},
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "dataset": dense.NamedImages(images),
        }
        loop = {"type": "ValLoop" if mode == "val" else "TestLoop"}
        return {f"{mode}_dataloader": loader, f"{mode}_cfg": loop, f"{mode}_evaluator": dense.evaluator_of(cfg)}

    def describe(self, cfg: Config, run: PreparedTraining, loader: DataLoader, model: nn.Module) -> list[str]:
        """Log lines that describe the run."""
        steps, images = cfg.train_cfg.max_iters, len(run.train)
        epochs = steps * run.plan.total / images
        return [
            f"schedule: {steps:,} steps = {epochs:.1f} epochs of {images:,} images; {len(run.val):,} for validation",
            f"learning rate: {describe(cfg.param_scheduler, steps)}",
            f"images normalised with {run.statistics}",
        ]

    def cautions(self, run: PreparedTraining, model: nn.Module) -> list[str]:
        """Warnings for the log."""
        caution = batch_norm_note(model, run.plan)
        return [caution] if caution else []

    def load_encoder(self, cfg: Config, model: BaseModel, path: str) -> checkpoints.LoadReport:
        """Load the pretrained encoder into the backbone; `UserError` if it does not fit or is another task's."""
        if report := load_encoder(model.backbone, path, cfg):
            return report
        own = getattr(model.backbone, "encoder", model.backbone)
        return load_backbone(own, path, cfg.default_scope, cfg.get("allow_partial", False))

    def trained_figures(self, cfg: Config, runner: SeededRunner) -> tuple[dict[str, float], dict]:
        """The figures of the last validation, and further values for results.json."""
        loop, [metric] = runner.val_loop, runner.val_loop.evaluator.metrics
        self.keep_outcomes(cfg, loop.dataloader.dataset.dataset, metric)
        precision = getattr(runner.optim_wrapper, "precision", None)  # ours has it
        recorded = {"precision": precision} if precision else {}
        return dense.figures(cfg, runner.train_loop.metrics), dense.by_class(metric) | recorded

    # Testing

    def prepare_test(self, cfg: Config, weights: str, check: bool) -> Prepared:
        """See `semaim.engine.testing.prepare_test`."""
        self.enter(cfg)
        statistics = settle_images(cfg, weights, whole=True)
        if check:
            model = dense.build(cfg.model, MODELS, "model")
            dense.load_whole(model, weights, lambda line: None, cfg.get("allow_partial", False))
            if cfg.get("tta"):
                dense.averaged(Config(cfg.to_dict()))
        (val,), described = self.data(cfg, SPLITS[1:], check)
        if check:
            dense.check_names(weights, val)
            dense.check_fit(cfg, val)
        counts = left_out(cfg, *SPLITS[1:])
        recorded = {"data": cfg.val_dataset.data_root, "stage": "test", **counts, **own_data.recorded(cfg)}
        if cfg.get("tta"):
            recorded |= {"stage": "test, several scales and flipped", "scales": list(cfg.tta_ratios)}
        return Prepared(self, statistics, val=val, lines=[*described, *left_out_lines(counts)], recorded=recorded)

    def measure(self, cfg: Config, run: Prepared, weights: str) -> dict[str, float]:
        """The config's metric of a trained detector or segmentor on the validation images."""
        record_origin(cfg, weights, whole=True)
        if cfg.get("tta"):
            dense.averaged(cfg)
        runner = make_runner(cfg, model=cfg.model, **self.validation(cfg, run, "test"))
        model = runner.model
        while hasattr(model, "module"):  # DDP's and test-time augmentation's wrappers
            model = model.module
        report = dense.load_whole(model, weights, runner.logger.info, cfg.get("allow_partial", False))
        record_load(report, cfg)
        for line in (*run.lines, f"images normalised with {run.statistics}"):
            runner.logger.info(line)
        metrics = dense.figures(cfg, runner.test())
        [metric] = runner.test_loop.evaluator.metrics
        self.keep_outcomes(cfg, run.val, metric)
        write_results(cfg, metrics, None, len(run.val), weights, **run.recorded, **dense.by_class(metric))
        return metrics


def batch_norm_note(model: nn.Module, plan: BatchPlan) -> str | None:
    """A warning if the model's batch normalisation sees fewer images than a step has; None if it sees them all.

    The model is the one that trains: on a CPU, processes do not synchronise batch statistics.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    synced = all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    seen = plan.images * (plan.processes if synced else 1)
    if not norms or seen == plan.total:
        return None
    return (
        f"batch normalisation sees {seen} images at a time, not the {plan.total} of a step, so gradients and running"
        " statistics are not the recipe's: see images_per_gpu and the number of GPUs"
    )
