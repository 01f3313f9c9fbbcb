"""Reading configs strictly: a misspelt key is an error that names the nearest right one, before anything starts."""

import importlib
import os
from pathlib import Path

from mmengine.config import Config

from semaim.checkpoints.normalisation import of_config
from semaim.engine.config_keys import FOREIGN, Types, check_numbers, check_options, check_tree
from semaim.engine.schedule import check_schedule
from semaim.errors import UserError, close, nearest
from semaim.places import config_folder, own_configs
from semaim.registry import task_for, task_named, task_of

CONFIGS = config_folder("semaim/configs")

#: Top-level keys of every config; each task adds its own, see `semaim.registry.Task.keys`.
KEYS = {
    "task": "what is trained or measured; a file in semaim/tasks",
    "custom_imports": "modules that register tasks, methods and types of your own, as in mmengine",
    "default_scope": "where types are looked up: semaim, mmdet or mmseg, as the task requires",
    "model": "what is trained",
    "total_batch_size": "images per optimizer step, over all processes",
    "images_per_gpu": "most images per process and pass; accumulation makes up the rest",
    "num_workers": "data loading processes per training process",
    "base_lr": "learning rate per 256 images",
    "optim_wrapper": "optimizer and gradient clipping",
    "param_scheduler": "learning rate schedule",
    "train_cfg": "number of epochs or iterations",
    "pretrained": "checkpoint or name (timm:NAME, hf-hub:REPO, local-dir:DIR) whose encoder training starts from",
    "arch": "timm's name of the encoder in a file that does not tell it, as with --arch",
    "default_hooks": "mmengine's hooks",
    "custom_hooks": "more hooks",
    "log_processor": "the log line",
    "visualizer": "where scalars and pictures go",
    "trackers": "trackers that get them too, as with --wandb and --mlflow: dict(wandb=PROJECT, mlflow=EXPERIMENT)",
    "seed": "random seed",
    "compile": "compile the transformer blocks: True, False, or auto for training runs of many steps on a GPU",
    "fsdp": "divide weights, gradients and optimizer state among the processes",
    "work_dir": "where the run writes",
    "cfg_options": "changes made on the command line, as recorded in results.json",
    "statistics_from": "where the images' mean and standard deviation came from, as recorded in results.json",
    "origin": "where weights and code came from, as recorded in results.json",
    "allow_partial": "load what fits of an encoder that is a different network, as with --allow-partial",
    "overrides": "what --override has changed in a resumed run, old and new, as recorded in results.json",
}


def load_config(path: str | os.PathLike, options: dict | None = None, check: bool = True) -> Config:
    """Read a config file, apply `--cfg-options`, and check every key.

    A path that does not exist is looked for among the suite's own configs too, so that an installed suite needs no
    checkout.

    Args:
        path: of the file.
        options: dotted path -> value.
        check: check the keys; otherwise mmdet and mmseg need not be imported.

    The modules in a config's `custom_imports` are imported: they are trusted like the config itself.
    """
    path = find_config(Path(path))
    try:
        cfg = Config.fromfile(path)
    except Exception as error:  # a config is Python code and may raise anything
        raise UserError(f"cannot read config {path}: {type(error).__name__}: {' '.join(str(error).split())}") from None
    for key in [key for key in cfg if key.startswith("_")]:  # variables that _base_ files share with others
        cfg.pop(key)
    options = options or {}
    if check:
        check_task(cfg, path)
    types = types_of(cfg) if check else None
    if check:
        check_options(cfg, options, top_keys(cfg), types)
    merge(cfg, options)
    if check:
        check_task(cfg, path)
        check_keys(cfg, types)
    cfg.cfg_options = {**cfg.get("cfg_options", {}), **options}
    of_config(cfg)  # raises for invalid statistics
    return cfg


def find_config(path: Path) -> Path:
    """The file, or the suite's own config of this name; `UserError` names the nearest existing ones."""
    if path.is_file():
        return path
    ours = own_configs()
    if path.as_posix() in ours:
        return ours[path.as_posix()]
    beside = [str(file) for file in path.parent.glob("*.py")] if path.parent != Path() else []
    known = [name for name in dict.fromkeys((*beside, *ours)) if "/_base_/" not in name]
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


def check_task(cfg: Config, path: Path) -> None:
    """`UserError` if a config names no task, or another task's scope."""
    task = task_named(cfg.get("task"), f"{path}: task")
    if cfg.get("default_scope") != task.scope:
        raise UserError(f"{path} has default_scope {cfg.get('default_scope')!r}: task {task.name!r} has {task.scope!r}")


def data_roots(cfg: Config, root: str) -> dict[str, str]:
    """What --data-root sets, in the form of --cfg-options."""
    return dict.fromkeys(task_for(cfg).roots, root)


def set_data_root(cfg: Config, root: str) -> None:
    """Read the images from another folder of the same layout."""
    for key, value in data_roots(cfg, root).items():
        *above, last = key.split(".")
        holder = cfg
        for part in above:
            holder = holder[part]
        holder[last] = value


def types_of(cfg: Config) -> Types | None:
    """The types that a config may name; None if its task's package is missing, which is reported later."""
    task = task_for(cfg)
    importlib.import_module("semaim.methods")
    try:
        importlib.import_module(task.package or "semaim.tasks")
    except ImportError:
        return None
    return Types(task.scope)


def top_keys(cfg: Config) -> dict[str, str]:
    """The keys allowed at a config's top level, and their meanings."""
    task = task_of(cfg)
    return KEYS | dict(task.keys if task else {})


def check_keys(cfg: Config, types: Types | None) -> None:
    """`UserError` for an unknown key, type or argument of a type, and for an impossible number."""
    known = top_keys(cfg)
    for key in cfg:
        if key not in known:
            raise UserError(f"unknown config key {key}: {nearest(key, known.keys() - FOREIGN)}")
    if "param_scheduler" in cfg:
        check_schedule(cfg.param_scheduler)
    if types:
        check_tree(cfg, types)
    check_numbers(cfg)
