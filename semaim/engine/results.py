"""Writes `results.json` to the work folder: what a stage measured, and its origin."""

import datetime
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.dist import get_world_size, is_main_process

from semaim import __version__
from semaim.checkpoints import LoadReport
from semaim.checkpoints.files import FORMAT
from semaim.checkpoints.normalisation import of_config
from semaim.checkpoints.safe_reading import read_file
from semaim.errors import UserError
from semaim.models.vit import SIZES
from semaim.places import is_name
from semaim.record import record_of
from semaim.registry import method_of, task_of

ROOT = Path(__file__).resolve().parent.parent.parent  #: the checkout, if there is one
CODE = ("semaim", "tools", "mmdet_configs", "mmseg_configs")  #: its folders that a figure depends on

ENCODERS = (
    "Classifier",
    "ViTDet",
    "SegmentationViT",
    "FrozenViT",
)  #: types besides the methods' that take a size of `SIZES`


def write_results(
    cfg: Config, metrics: dict, train_images: int | None, val_images: int, checkpoint: str | None, **more
) -> None:
    """Write `results.json`, on the main process.

    Args:
        cfg: of the run; names the work folder; `record_origin` has recorded in it where weights and code come from.
        metrics: name -> number.
        train_images, val_images: number of images trained on (or searched) and evaluated on; None for the number
            recorded in the measured checkpoint.
        checkpoint: whose encoder was measured; None for random weights.
        **more: further plain values; `data`, if it is not `cfg.dataset.root`.
    """
    if not is_main_process():
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    origin = dict(cfg.get("origin") or {})
    trained_on = origin.pop("train_images", None)
    trained_with = origin.pop("cfg_options", None) or {}
    task = task_of(cfg)
    assert task is not None  # every run has a task
    values = {
        "config": origin.pop("config", None) or config_name(cfg),
        "metrics": {name: float(value) for name, value in metrics.items()},  # some are numpy's
        "method": origin.pop("method", None),
        "backbone": backbone_of(cfg),
        "task": None if task.pretrains else task.title,  # a pretraining is measured by other tasks
        "reported": {name: asdict(metric) for name, metric in task.reported(metrics).items()},
        "checkpoint": checkpoint,
        **origin,
        "data": str(more.pop("data", None) or cfg.dataset.root),
        "train_images": trained_on if train_images is None else train_images,
        "val_images": val_images,
        **statistics_of(cfg),
        "seed": cfg.seed,
        "cfg_options": {**trained_with, **(cfg.get("cfg_options") or {})},
        **({"overrides": dict(cfg.overrides)} if cfg.get("overrides") else {}),
        **more,
        "device": f"{get_world_size()} x {device}",
        "semaim": __version__,
        "torch": torch.__version__,
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
    }
    try:
        record_of(values).write(Path(cfg.work_dir))
    except OSError as error:
        raise UserError(
            f"cannot write {cfg.work_dir}/results.json: {error.strerror}; the figures are in the log above"
        ) from None


def statistics_of(cfg: Config) -> dict:
    """mean, std for pixels from 0 to 1 that the config has by now, and their origin; how labelled images are cut."""
    found = of_config(cfg)
    statistics = {"mean": found.mean, "std": found.std, "statistics_from": found.origin} if found else {}
    return statistics | ({"images": prepared} if (prepared := prepared_images(cfg)) else {})


def prepared_images(cfg: Config) -> dict:
    """Size and crop of labelled images, as the config or the encoder's source has set them; empty for others."""
    size = _mapping(_mapping(cfg.get("model")).get("network")).get("img_size")
    dataset = _mapping(cfg.get("dataset"))
    if size is None or "crop_pct" not in dataset:
        return {}
    kept = {key: dataset[key] for key in ("crop_pct", "crop_mode", "interpolation") if dataset.get(key) is not None}
    return {"size": size, **kept}


def record_origin(cfg: Config, weights: str | None, resumed: str | None = None, whole: bool = False) -> None:
    """Record in `cfg.origin`, on the main process, where weights and code come from; checkpoints and results keep it.

    Args:
        cfg: of the run; its `origin` is set.
        weights: the checkpoint started from or measured; None for none.
        resumed: this run's own checkpoint to resume from; its record of the run's start is kept.
        whole: the weights are measured as trained, with their head: length and changes of their training are recorded.
    """
    if not is_main_process():
        return
    found = origin_of(resumed, same=True) if resumed and not _pretrains(cfg) else {}
    if not found and weights:
        found = origin_of(weights, same=whole, trained=whole)
    own = {"method": title_of(cfg.model)} if _pretrains(cfg) else {}
    cfg.origin = {**found, **own, "config": config_name(cfg), "commit": commit()}


def record_load(report: LoadReport, *cfgs: Config) -> LoadReport:
    """Record in the origin of these configs, on the main process, what was loaded; returns the report.

    `load_report` is the last load's; `partly_loaded` says in words which loads left something out, including earlier
    ones in the history of the weights.
    """
    for cfg in cfgs if is_main_process() else ():
        origin = dict(cfg.get("origin") or {})
        parts = [origin.get("partly_loaded"), report.partial_note]
        partly = "; ".join(dict.fromkeys(part for part in parts if part))
        cfg.origin = {
            **origin,
            **({"allow_partial": True} if cfg.get("allow_partial") else {}),
            **({"partly_loaded": partly} if partly else {}),
            "load_report": report.summary(),
        }
    return report


def origin_of(path: str, same: bool = False, trained: bool = False) -> dict:
    """method and pretrain_config, _epochs, _images and _options of one of our checkpoints; empty for others.

    Args:
        path: the checkpoint.
        same: it belongs to the run itself; else a fine-tuned checkpoint has another method than its pretraining.
        trained: also its own length, epochs or iterations, its number of images, and its own cfg_options.
    """
    if is_name(path):
        return {} if same else {"method": path.partition(":")[2]}
    content = _mapping(read_file(path))
    config = _mapping(content.get("config"))
    if content.get("format") != FORMAT or not config:
        return {}
    known = _mapping(config.get("origin"))
    partly = {"partly_loaded": known["partly_loaded"]} if isinstance(known.get("partly_loaded"), str) else {}
    if _pretrains(config):
        recorded = known.get("method")  # perhaps from a module that only the pretraining config names
        return {
            **partly,
            "method": recorded if isinstance(recorded, str) else title_of(_mapping(config.get("model"))),
            "pretrain_config": name if isinstance(name := known.get("config"), str) else None,
            "pretrain_epochs": _whole(content.get("epoch")),
            "pretrain_images": _whole(content.get("images")),
            "pretrain_options": dict(_mapping(config.get("cfg_options"))),
        }
    names: tuple[str, ...] = ("method", "pretrain_config", "pretrain_epochs", "pretrain_images", "pretrain_options")
    if same and not trained:  # a resumed run: also its own load
        names += ("load_report", "allow_partial")
    origin = {name: known[name] for name in names if known.get(name) is not None} | partly
    if not same and "method" in origin:
        task = task_of(config)
        origin["method"] = f"{origin['method']} after {task.title if task else 'other training'}"
    if trained:
        iterations = "max_iters" in _mapping(config.get("train_cfg"))
        key, counted = ("iterations", "step") if iterations else ("epochs", "epoch")
        origin[key] = _whole(content.get(counted))
        origin["train_images"] = _whole(content.get("images"))
        origin["cfg_options"] = dict(_mapping(config.get("cfg_options")))
    return origin


def config_name(cfg: Config) -> str | None:
    """The name of a config's file, with its folder if it is not one of the suite's."""
    if not cfg.filename:
        return None
    path = Path(cfg.filename).resolve()
    if any(path.is_relative_to(ROOT / folder) for folder in CODE):
        return path.name
    return "/".join(path.parts[-2:])


def title_of(model: Mapping) -> str | None:
    """The method that a pretraining's model config describes, as published.yaml spells it."""
    network = _mapping(model.get("network"))
    method = method_of(network)
    return method.title(network) if method else None


def backbone_of(cfg: Mapping) -> str | None:
    """ViT-B for a config's encoder of a published size, its sizes in words for another; None if it is not ours."""
    model = _mapping(cfg.get("model"))
    model = _mapping(model.get("module")) or model  # inside test-time augmentation
    encoder = _mapping(model.get("network")) or _mapping(model.get("backbone"))
    if described := _mapping(encoder.get("encoder")):
        return described.get("arch") or "ViT, {depth} blocks of {embed_dim} channels".format_map(described)
    preset = SIZES.get(encoder.get("size", "base"))
    known = encoder.get("type") in ENCODERS or method_of(encoder) is not None
    if not known or preset is None:
        return None
    sizes = {key: encoder.get(key) or value for key, value in preset.items()}
    name = next((name for name, published in SIZES.items() if published == sizes), None)
    if name is None:
        return f"ViT, {sizes['depth']} blocks of {sizes['embed_dim']} channels"
    patch = encoder.get("patch_size", 16)
    return f"ViT-{name[0].upper()}" + ("" if patch == (14 if name == "huge" else 16) else f"/{patch}")


def commit() -> str | None:
    """The checkout's git commit, with "+changes" if code or configs differ; None if it is not a checkout."""

    def git(*arguments: str) -> str:
        line = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(line, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:  # installed inside another project
            return None
        changed = git("status", "--porcelain", "--", *(name for name in CODE if (ROOT / name).is_dir()))
        return git("rev-parse", "HEAD") + "+changes" * bool(changed)
    except (OSError, subprocess.SubprocessError):
        return None


def _pretrains(config: Mapping) -> bool:
    """Whether a config pretrains, so that other tasks measure it."""
    task = task_of(config)
    return task is not None and task.pretrains


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _mapping(value: object) -> Mapping:
    """A mapping unchanged, anything else as an empty one: configs in checkpoints are not trusted."""
    return value if isinstance(value, Mapping) else {}
