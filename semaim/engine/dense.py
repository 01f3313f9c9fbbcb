"""Shared by detectors and segmentors: mmdet's and mmseg's models and data, built so that runs resume exactly."""

import copy
import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset, pseudo_collate
from mmengine.evaluator import BaseMetric
from mmengine.registry import DATASETS, METRICS, MODELS, OPTIM_WRAPPERS, DefaultScope, init_default_scope
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.utils.data import Dataset

from semaim import checkpoints
from semaim.data.decoding import check_whole, load_image
from semaim.data.seeding import seeded
from semaim.drawing.objects import use_palette
from semaim.engine.classes import check_classes, keep_classes, registered, takes
from semaim.engine.optim import DeferredOptimWrapper
from semaim.engine.own_data import check_named
from semaim.engine.precision import autocast, check_precision, computed_in
from semaim.errors import UserError
from semaim.places import to_install
from semaim.registry import SCOPE, task_for, task_of, tasks

#: A long side in pixels that no image reaches.
UNLIMITED = 10**6


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(DeferredOptimWrapper):
    """Autocast to bf16, without loss scaling, on a GPU, and if asked on a CPU, where mmengine's AmpOptimWrapper fails.

    Args:
        cpu_precision: of the training on a CPU, "fp32" or, where the processor has instructions for it, "bf16".
    """

    def __init__(self, *args, cpu_precision: str = "fp32", **kwargs):
        super().__init__(*args, **kwargs)
        check_precision("optim_wrapper", "bf16", cpu_precision)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.precision = computed_in(self.device, "bf16", cpu_precision)

    @contextmanager
    def optim_context(self, model: nn.Module):
        """The context of a forward pass."""
        with super().optim_context(model):
            with autocast(self.device, self.precision):
                yield


class DenseImages(Dataset):
    """A data set that raises a `UserError` naming the file that it cannot read or prepare."""

    def __init__(self, dataset: BaseDataset):
        self.dataset, self.metainfo = dataset, dataset.metainfo
        self.classes = list(dataset.metainfo["classes"])

    def __len__(self) -> int:
        return len(self.dataset)

    def load(self, index: int) -> dict:
        """An image of the data set after its pipeline."""
        files = _files_in(self.dataset.get_data_info(index))
        try:
            for path in files:
                check_whole(path)
            return self.dataset[index]
        except UserError:
            raise
        except Exception as error:  # the transforms raise many types
            for path in files:
                load_image(path)  # reports what is wrong with a broken file
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"cannot prepare image {files[0] if files else index}: {reason}") from None


def files_of(dataset: BaseDataset) -> Iterator[str]:
    """Paths of the annotation file, images and label maps, in the order of the data set."""
    if dataset.ann_file:
        yield dataset.ann_file
    for index in range(len(dataset)):
        yield from _files_in(dataset.get_data_info(index))


def _files_in(info: Mapping) -> list[str]:
    return [info[key] for key in ("img_path", "seg_map_path") if info.get(key)]


class NamedImages(DenseImages):
    """The samples of a data set by index, unchanged."""

    def __getitem__(self, index: int) -> dict:
        return self.load(index)


class SeededImages(DenseImages):
    """The samples of a data set by (epoch, index), with randomness that depends on (seed, epoch, index) alone."""

    def __init__(self, dataset: BaseDataset, seed: int):
        super().__init__(dataset)
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        with seeded(self.seed, epoch, index):
            return self.load(index)


def is_dense(cfg: Config) -> bool:
    """Whether a config's task uses mmdet's or mmseg's models."""
    task = task_of(cfg)
    return task is not None and task.scope != SCOPE


def check_dense(cfg: Config) -> None:
    """`UserError` unless the config's task uses mmdet's or mmseg's models."""
    if not is_dense(cfg):
        raise UserError(f"{cfg.filename} is no detector's or segmentor's config")


def enter(cfg: Config) -> None:
    """Register the types of the task's configs and apply `keep_classes` and the classes' colours.

    `UserError` if packages are missing, or a config for own data has none.
    """
    task = task_for(cfg)
    try:
        importlib.import_module(task.package or "semaim.tasks")
    except ImportError as error:
        raise UserError(f"{task.needs} cannot be imported ({error}): install it with {to_install('all')}") from None
    init_default_scope(cfg.default_scope)
    for message in (
        "``build_loss`` would",
        "Default ``avg_non_ignore`` is",
        "`reduce_zero_label` will be deprecated",
        "The shape of value will",
    ):
        warnings.filterwarnings("ignore", message=message)  # for mmseg's own developers
    check_named(cfg)
    use_palette(((cfg.get("val_dataset") or {}).get("metainfo") or {}).get("palette"))
    if cfg.get("keep_classes"):
        use_palette(None)  # its colours are those of all classes
        keep_classes(cfg)


def check_positions(model: nn.Module) -> None:
    """`UserError` if relative positions would be trained at another size than they are made for.

    Tests are not checked: a trained model also runs at other sizes, with its tables resampled.
    """
    made_for = getattr(model.backbone, "made_for", None)
    sizes = {name: getattr(model.data_preprocessor, name, None) for name in ("side", "size")}
    name, size = next(((name, size) for name, size in sizes.items() if size), (None, None))
    if made_for and size and made_for != to_2tuple(size):
        height, width = to_2tuple(size)
        raise UserError(
            f"model.data_preprocessor.{name} makes images of {width} x {height} pixels, and the relative positions are"
            f" made for {made_for[1]} x {made_for[0]}: set model.backbone.img_size to the same"
        )


def check_fit(cfg: Config, images: BaseDataset) -> None:
    """`UserError` if the model cannot take validation images, which would otherwise show hours into a training."""
    preprocess = build(cfg.model.data_preprocessor, MODELS, "model.data_preprocessor")
    preprocess(pseudo_collate([images[0]]), False)
    test = cfg.model.get("test_cfg") or {}
    if "mode" in test:  # a segmentor's, which reads it only when it predicts
        lacking = [key for key in ("crop_size", "stride") if test["mode"] == "slide" and key not in test]
        if test["mode"] not in ("whole", "slide") or lacking:
            more = f", without {' and '.join(lacking)}" if lacking else ": choose whole or slide"
            raise UserError(f"model.test_cfg.mode is {test['mode']!r}{more}")


def build(config: dict, registry, what: str):
    """Build from a registry; a wrong key is a `UserError`.

    A copy of the config is used: mmdet's two-stage detectors change theirs, which a checkpoint would record.
    """
    try:
        return registry.build(copy.deepcopy(config))
    except (TypeError, KeyError, ValueError, AssertionError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{what}: {reason or 'an assertion of its code does not hold: look at its sizes'}") from None
    except FileNotFoundError as error:
        raise UserError(
            f"{what}: no such file: {error.filename or error} (name the data with --data-root DIR)"
        ) from None


def check_classes_of(cfg: Config, splits: tuple[str, ...]) -> None:
    """`UserError` if classes of these splits, their files and the model's heads differ, or there is no metric."""
    for split in splits:
        if "data_root" not in cfg[split]:
            raise UserError(f"{split} is a {cfg[split].get('type')} without data_root: give one data set, not wrapped")
        check_classes(cfg, split)
    build(evaluator_of(cfg), METRICS, "val_evaluator")


def build_data(cfg: Config, splits: tuple[str, ...] = ("train_dataset", "val_dataset")) -> tuple[BaseDataset, ...]:
    """Training and validation images."""
    sets = []
    for split in splits:
        empty = UserError(f"{split}: no images with annotations in {cfg[split].data_root}")
        try:
            images = build(cfg[split], DATASETS, split)
        except UserError as error:
            raise empty if "need at least one array" in str(error) else error from None  # mmengine packs none
        if not len(images):
            raise empty
        sets.append(images)
    return tuple(sets)


def evaluator_of(cfg: Config) -> dict:
    """The config of the metric, with the annotation file if it takes one."""
    if not isinstance(cfg.val_evaluator, Mapping):
        raise UserError(f"val_evaluator is {cfg.val_evaluator!r}: give one metric, dict(type=...)")
    evaluator = dict(cfg.val_evaluator)
    if takes(registered(cfg, METRICS, evaluator["type"], "val_evaluator"), "ann_file"):
        evaluator["ann_file"] = str(Path(cfg.val_dataset.data_root) / cfg.val_dataset.ann_file)
    return evaluator


def scales_of(scale: tuple[int, int], ratios: Iterable[float]) -> list[tuple[int, int]]:
    """Scales (limit of the long side, short side) of a multi-scale test, by their ratios to the plain test's.

    The short side never falls below the plain test's, so that windows of the crop size fit, and the long side follows
    without a limit. So all ratios up to 1 give the same size, which is counted once for each. This is mmseg 0.x's
    `min_size`, with which MAE's published figure was measured.
    """
    short = min(scale)
    return [(UNLIMITED, max(short, int(short * ratio))) for ratio in ratios]


def averaged(cfg: Config) -> None:
    """Change the config so that predictions are averaged over the scales of `tta_ratios`, each also flipped."""
    if "tta_ratios" not in cfg:
        raise UserError("--tta: this config has no tta_ratios; segmentors' have")
    steps = [dict(step) for step in cfg.val_dataset.pipeline]
    place = next(index for index, step in enumerate(steps) if step["type"] == "Resize")
    scales = [{**steps[place], "scale": scale} for scale in scales_of(steps[place]["scale"], cfg.tta_ratios)]
    flips = [{"type": "RandomFlip", "prob": prob, "direction": "horizontal"} for prob in (0.0, 1.0)]
    then = [[step] for step in steps[place + 1 :]]
    cfg.val_dataset.pipeline = [*steps[:place], {"type": "TestTimeAug", "transforms": [scales, flips, *then]}]
    cfg.model = {"type": "SegTTAModel", "module": cfg.model}


def check_names(weights: str, images: BaseDataset) -> None:
    """`UserError` if a checkpoint was trained on other classes than these images have, or in another order."""
    trained, own = checkpoints.classes_of(checkpoints.read_file(weights)), list(images.metainfo["classes"])
    if trained and trained != own:
        pairs = zip_longest(trained, own, fillvalue="none")
        place, (theirs, ours) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        raise UserError(
            f"{weights} was trained on other classes than val_dataset has: class {place} is {theirs!r} there and"
            f" {ours!r} here: test with the classes of its training"
        )


def by_class(metric: BaseMetric) -> dict[str, Any]:
    """What a metric has found of the single classes, for results.json; empty if it looks at none.

    The number of classes in its last mean and of all, and the figures of each.
    """
    found = dict(zip(("classes_evaluated", "classes"), getattr(metric, "counted", None) or (), strict=False))
    classwise = getattr(metric, "classwise", None)  # a plain switch in COCO's metrics
    return found | ({"classwise": classwise} if isinstance(classwise, Mapping) else {})


def figures(cfg: Config, metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics without times, and without COCO's per-class figures, whose table is in the log.

    COCO's metrics return nothing if nothing at all was detected; that is an AP of 0.
    """
    kept = {name: value for name, value in metrics.items() if not name.endswith(("time", "_precision"))}
    if kept:
        return kept
    kind = registered(cfg, METRICS, cfg.val_evaluator.type, "val_evaluator")
    if takes(kind, "ann_file"):
        asked = cfg.val_evaluator.get("metric", "bbox")
        prefix = cfg.val_evaluator.get("prefix") or kind.default_prefix
        return {f"{prefix}/{name}_mAP": 0.0 for name in ([asked] if isinstance(asked, str) else asked)}
    return kept


def load_whole(
    model: nn.Module, path: str, log: Callable[[str], None], partial: bool | None = None
) -> checkpoints.LoadReport:
    """Load all weights of a trained detector or segmentor; `UserError` if they do not fit.

    Reads our and OpenMMLab's files, and those whose names the scope's package knows: detectron2's whole ViTDet
    detectors, mmseg's UperNet on MAE.

    Args:
        model: the whole model.
        path: the file.
        log: called with a line about what was loaded.
        partial: ignore what the model does not read; None if the command has no --allow-partial.
    """
    content = checkpoints.read_file(path)
    weights: Mapping[str, Tensor] = next(
        (content[k] for k in ("model", "state_dict") if isinstance(content.get(k), dict)), {}
    )
    scope = DefaultScope.get_current_instance()
    for package in dict.fromkeys(task.package for task in tasks() if scope and task.scope == scope.scope_name):
        rename = getattr(importlib.import_module(package), "foreign_weights", None) if package else None
        renamed = rename(content, model, path) if rename else None
        weights = weights if renamed is None else renamed
    own = model.state_dict()
    missing, extra = [n for n in own if n not in weights], [n for n in weights if n not in own]
    wrong = [n for n in own if n in weights and own[n].shape != weights[n].shape]
    if missing or wrong:
        name = (wrong + missing)[0]
        shapes = f" ({tuple(weights[name].shape)}, in the model {tuple(own[name].shape)})" if name in wrong else ""
        raise UserError(
            f"{path} does not fit this config: {len(missing)} weights are missing and {len(wrong)} of another shape,"
            f" such as {name}{shapes}: give the config of its training"
        )
    if extra and not partial:
        flag = "" if partial is None else " (--allow-partial leaves them out, and results say so)"
        raise UserError(
            f"{path} computes with more than this config's model, which does not read {checkpoints.kinds(extra)} (first"
            f" {extra[0]}): give the config of its training{flag}"
        )
    model.load_state_dict({name: weights[name] for name in own})
    left = f"; NOT LOADED: {checkpoints.kinds(extra)}" if extra else ""
    log(f"loaded {len(own)} tensors from {path}{left}")
    return checkpoints.LoadReport(Path(path), "whole model", list(own), unexpected=extra, unread=extra)
