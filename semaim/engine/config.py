"""Reading configs strictly: a misspelt key is an error that names the nearest right one, before anything starts."""

import importlib
import inspect
import os
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import (
    DATASETS,
    HOOKS,
    LOG_PROCESSORS,
    LOOPS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    VISBACKENDS,
    VISUALIZERS,
)

from semaim.errors import UserError, nearest
from semaim.normalisation import of_config

#: Keys of a `type` that its builder takes, not the class itself.
BUILDER_KEYS = {"type", "constructor", "paramwise_cfg", "priority"}

CONFIGS = Path(__file__).parent.parent / "configs"

REGISTRIES = (
    MODELS,
    DATASETS,
    OPTIMIZERS,
    OPTIM_WRAPPERS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    PARAM_SCHEDULERS,
    LOOPS,
    HOOKS,
    LOG_PROCESSORS,
    VISUALIZERS,
    VISBACKENDS,
)

#: Top-level keys of a config of a stage on images.
KEYS = {
    "default_scope": "mmengine for the stages on images; mmdet and mmseg for theirs",
    "model": "what is trained",
    "dataset": "the images and their augmentation",
    "total_batch_size": "images per optimizer step, over all processes",
    "images_per_gpu": "at most so many images per process and pass; accumulation makes up the rest",
    "num_workers": "data loading processes per training process",
    "base_lr": "learning rate per 256 images",
    "optim_wrapper": "optimizer and gradient clipping",
    "param_scheduler": "learning rate schedule",
    "train_cfg": "number of epochs",
    "evaluation": "what is measured on features",
    "pretrained": "checkpoint whose encoder training starts from",
    "default_hooks": "mmengine's hooks",
    "custom_hooks": "more hooks",
    "log_processor": "the log line",
    "visualizer": "where scalars and pictures go",
    "seed": "of everything random",
    "compile": "compile the blocks with torch.compile",
    "fsdp": "divide weights, gradients and optimizer state among the processes",
    "work_dir": "where the run writes",
    "cfg_options": "the changes of the command line, as results.json keeps them",
    "statistics_from": "where the images' mean and standard deviation came from, as results.json keeps it",
    "origin": "where weights and code came from, as results.json keeps it",
}

#: Top-level keys of a config for mmdet or mmseg that are others.
DENSE_KEYS = {
    "train_dataset": "the data set trained on, as in mmdet and mmseg",
    "val_dataset": "the data set validated on",
    "val_evaluator": "the metric",
    "keep_classes": "of a COCO file's categories those that are detected; the others are left out, and counted",
    "base_batch_size": "images that base_lr belongs to",
    "test_pipeline": "how an image is prepared for prediction",
    "tta_ratios": "scales, over that of the validation and no smaller, that --tta averages over, each also flipped",
    "tta": "whether it does so without being asked",
    "most_ignored": "largest share of a split's pixels that may be unlabelled; a larger one is an error",
}


def load_config(path: str | os.PathLike, options: dict | None = None) -> Config:
    """Read a config file, apply `--cfg-options`, and check every key.

    A path that does not exist is looked for among the package's own configs too, so that an installed package needs
    no checkout.
    """
    path = Path(path)
    if not path.is_file():
        ours = {str(file.relative_to(CONFIGS.parent.parent)): file for file in CONFIGS.rglob("*.py")}
        if str(path) not in ours:
            names = {Path(name).name for name in ours if "/_base_/" not in name}
            raise UserError(f"no such config: {path}: {nearest(path.name, names)}")
        path = ours[str(path)]
    try:
        cfg = Config.fromfile(path)
    except Exception as error:  # a config is Python: anything can go wrong in it
        raise UserError(f"cannot read config {path}: {type(error).__name__}: {error}") from None
    try:
        cfg.merge_from_dict(options or {})
    except (KeyError, TypeError, AssertionError, AttributeError) as error:
        raise UserError(f"--cfg-options: {error}") from None
    check_keys(cfg)
    cfg.cfg_options = {**cfg.get("cfg_options", {}), **(options or {})}
    of_config(cfg)  # raises for what are no statistics
    return cfg


def check_keys(cfg: Config) -> None:
    """`UserError` for a top-level key, a type, or an argument of a type that does not exist."""
    dense = cfg.get("default_scope") in ("mmdet", "mmseg")
    known = KEYS.keys() - {"compile"} | DENSE_KEYS.keys() if dense else KEYS
    for key in cfg:
        if key not in known:
            raise UserError(f"unknown config key {key}: {nearest(key, known)}")
    if not dense:  # mmdet and mmseg check their own types when they are built
        importlib.import_module("semaim.engine.evaluation")  # registers all that our configs name
        _check_node("", cfg.to_dict())


def _check_node(path: str, node: object) -> None:
    if isinstance(node, list | tuple):
        for index, item in enumerate(node):
            _check_node(f"{path}[{index}]", item)
    if not isinstance(node, dict):
        return
    if "type" in node:
        built = _find(path, node["type"])
        known = arguments(built)
        for key in node:
            if known is not None and key not in known and key not in BUILDER_KEYS:
                raise UserError(f"unknown config key {path}.{key}: {nearest(key, known)}")
    for key, item in node.items():
        _check_node(f"{path}.{key}" if path else key, item)


def _find(path: str, name: str) -> object:
    for registry in REGISTRIES:
        if name in registry.module_dict:
            return registry.module_dict[name]
    known = {name for registry in REGISTRIES for name in registry.module_dict}
    raise UserError(f"unknown type {name!r} in {path}: {nearest(name, known)}")


def arguments(built: object) -> set[str] | None:
    """Names of the arguments a class or builder takes, base classes included; None if it takes any."""
    names: set[str] = set()
    pending = [c.__init__ for c in inspect.getmro(built) if c is not object] if inspect.isclass(built) else [built]
    for function in pending:
        try:
            parameters = inspect.signature(function).parameters.values()
        except ValueError:
            return None
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break  # nothing is passed further up
        if passes_to := getattr(function, "arguments_of", None):
            names |= arguments(passes_to) or set()
    return names - {"self"}
