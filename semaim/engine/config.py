"""Reading configs strictly: a misspelt key is an error that names the nearest right one, before anything starts."""

import importlib
import os
from pathlib import Path

from mmengine.config import Config

from semaim.checkpoints.normalisation import of_config
from semaim.engine.config_keys import FOREIGN, Types, check_numbers, check_options, check_tree
from semaim.engine.schedule import check_schedule
from semaim.errors import UserError, close, nearest

CONFIGS = Path(__file__).parent.parent / "configs"

SCOPES = ("mmengine", "mmdet", "mmseg")  #: of the stages on images, of detectors and of segmentors

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
    "allow_partial": "load what fits of an encoder that is another network, as --allow-partial says",
    "overrides": "what --override has changed of a resumed run, old and new, as results.json keeps it",
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


def load_config(path: str | os.PathLike, options: dict | None = None, check: bool = True) -> Config:
    """Read a config file, apply `--cfg-options`, and check every key.

    A path that does not exist is looked for among the package's own configs too, so that an installed package needs
    no checkout.

    Args:
        path: of the file.
        options: dotted path -> value.
        check: look at the keys; without, mmdet and mmseg need not be imported.
    """
    path = find_config(Path(path))
    try:
        cfg = Config.fromfile(path)
    except Exception as error:  # a config is Python: anything can go wrong in it
        raise UserError(f"cannot read config {path}: {type(error).__name__}: {' '.join(str(error).split())}") from None
    for key in [key for key in cfg if key.startswith("_")]:  # what files of _base_ lend to others
        cfg.pop(key)
    options = options or {}
    if check and cfg.get("default_scope") not in SCOPES:
        raise UserError(f"{path} has default_scope {cfg.get('default_scope')!r}: give {', '.join(SCOPES)}")
    types = types_of(cfg) if check else None
    if check:
        check_options(cfg, options, top_keys(cfg), types)
    merge(cfg, options)
    if check:
        check_keys(cfg, types)
    cfg.cfg_options = {**cfg.get("cfg_options", {}), **options}
    of_config(cfg)  # raises for what are no statistics
    return cfg


def find_config(path: Path) -> Path:
    """The file, or the package's own of this name; `UserError` names the nearest of what is there."""
    if path.is_file():
        return path
    ours = {str(file.relative_to(CONFIGS.parent.parent)): file for file in CONFIGS.rglob("*.py")}
    if str(path) in ours:
        return ours[str(path)]
    beside = [str(file) for file in path.parent.glob("*.py")] if path.parent != Path() else []
    known = [name for name in (*beside, *ours) if "/_base_/" not in name]
    near = close(path.name, {Path(name).name for name in known})
    found = [name for other in near for name in known if Path(name).name == other]
    where = f"did you mean {' or '.join(found[:3])}?" if found else "see semaim/configs, mmdet_configs, mmseg_configs"
    raise UserError(f"no such config: {path}: {where}")


def merge(cfg: Config, options: dict) -> None:
    """Apply `--cfg-options`."""
    try:
        cfg.merge_from_dict(options)
    except (KeyError, TypeError, AssertionError, AttributeError) as error:
        raise UserError(f"--cfg-options: {' '.join(str(error).split())}") from None


def types_of(cfg: Config) -> Types | None:
    """What the types of a config name; None where its scope's package is missing, which is said later."""
    scope = cfg.get("default_scope", "mmengine")
    if not is_dense(cfg):
        importlib.import_module("semaim.engine.evaluation")  # registers all that our configs name
        return Types()
    from semaim.engine import dense

    try:
        importlib.import_module(dense.SCOPES[scope])
    except ImportError:
        return None
    return Types(scope)


def is_dense(cfg: Config) -> bool:
    """Whether a config is one for mmdet or mmseg."""
    return cfg.get("default_scope") in SCOPES[1:]


def top_keys(cfg: Config) -> dict[str, str]:
    """The keys that may stand at a config's top, and what they are."""
    dense = {key: text for key, text in (KEYS | DENSE_KEYS).items() if key != "compile"}
    return dense if is_dense(cfg) else KEYS


def check_keys(cfg: Config, types: Types | None) -> None:
    """`UserError` for a key, a type, or an argument of a type that does not exist, and for an impossible number."""
    known = top_keys(cfg)
    for key in cfg:
        if key not in known:
            raise UserError(f"unknown config key {key}: {nearest(key, known.keys() - FOREIGN)}")
    if "param_scheduler" in cfg:
        check_schedule(cfg.param_scheduler)
    if types:
        check_tree(cfg, types)
    check_numbers(cfg)
