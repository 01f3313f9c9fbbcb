"""What a config's annotations hold: the classes of heads and files are the same, or a chosen subset; masks or not."""

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.registry import DATASETS, METRICS, MODELS, TRANSFORMS, Registry

from semaim.data.categories import Categories, check_categories
from semaim.data.coco import check_coco_file, read_json
from semaim.data.pairs import part_of
from semaim.engine.config_keys import initialisers
from semaim.errors import UserError


def registered(cfg: Config, registry: Registry, kind: str | type, what: str) -> type[Any]:
    """The class that a config's `type` names; `UserError` if there is none."""
    with registry.switch_scope_and_registry(cfg.default_scope) as scoped:
        found = kind if isinstance(kind, type) else scoped.get(kind)
    if found is None:
        raise UserError(f"{what}: unknown type {kind!r}")
    return found


def takes(kind: type, argument: str) -> bool:
    """Whether a class or one of its base classes has an argument of that name."""
    return any(argument in inspect.signature(function).parameters for function in initialisers(kind))


def reads_coco(kind: type) -> bool:
    """Whether a data set reads COCO's annotation files as mmdet's `CocoDataset` does; LVIS's class does, too."""
    reader = next((base for base in kind.__mro__ if "load_data_list" in vars(base)), object)
    return "COCOAPI" in vars(reader)


def classes_of(cfg: Config, split: str) -> list[str]:
    """The classes of a split: the config's, else the data set's own."""
    kind = registered(cfg, DATASETS, cfg[split].type, split)
    return list(kind._load_metainfo(cfg[split].get("metainfo")).get("classes", ()))


def heads_of(cfg: Config) -> list[dict]:
    """The heads in a detector's or segmentor's config that predict classes."""
    parts = cfg.model, cfg.model.get("roi_head") or {}
    names = ("bbox_head", "mask_head", "decode_head", "auxiliary_head")
    heads = [part.get(name) for part in parts for name in names]
    heads = [head for entry in heads for head in (entry if isinstance(entry, list | tuple) else [entry])]
    return [head for head in heads if head and "num_classes" in head]


def without_masks(cfg: Config) -> None:
    """Change a detector's config so that it learns and measures boxes alone: heads, pipelines, metric.

    `UserError` for a detector that cannot do without masks.
    """
    steps = list(_steps([cfg.train_dataset.pipeline, cfg.val_dataset.pipeline, cfg.get("test_pipeline")]))
    parts = {"model": cfg.model, "model.roi_head": cfg.model.get("roi_head") or {}}
    found = [(where, name) for where, part in parts.items() for name in part if name.startswith("mask_")]
    for where, name in found:
        kind = registered(cfg, MODELS, parts[where]["type"], where)
        if _default(kind, name) is not None:
            raise UserError(f"masks: false: a {kind.__name__} needs its {name}: give the config of a detector of boxes")
        del parts[where][name]
    reads = found or any(step.get("with_mask") for step in steps)
    if reads and not any("bbox_head" in part for part in parts.values()):
        raise UserError(f"masks: false: {cfg.model.type} learns masks alone: give the config of a detector of boxes")
    for step in steps:
        kind = registered(cfg, TRANSFORMS, step["type"], "pipeline")
        step.update({name: False for name in ("with_mask", "by_mask") if takes(kind, name)})
    if "metric" in (metric := cfg.val_evaluator):
        names = [metric.metric] if isinstance(metric.metric, str) else metric.metric
        metric.metric = [name for name in names if name != "segm"] or ["bbox"]


def _steps(pipeline: Any) -> Iterator[dict]:
    """The steps of a pipeline, also of those inside others."""
    for node in pipeline.values() if isinstance(pipeline, dict) else pipeline or ():
        if isinstance(node, dict) and "type" in node:
            yield node
        if isinstance(node, dict | list | tuple):
            yield from _steps(node)


def _default(kind: type, argument: str) -> Any:
    """The default of an argument of a class; `inspect.Parameter.empty` if it has none, or does not take it."""
    found = (inspect.signature(function).parameters.get(argument) for function in initialisers(kind))
    return next((parameter.default for parameter in found if parameter is not None), inspect.Parameter.empty)


def keep_classes(cfg: Config) -> None:
    """Change the config so that only its `keep_classes` are detected: classes of both data sets, sizes of the heads."""
    asked = [cfg.keep_classes] if isinstance(cfg.keep_classes, str) else list(cfg.keep_classes)
    for split in ("train_dataset", "val_dataset"):
        if not reads_coco(registered(cfg, DATASETS, cfg[split].type, split)):
            raise UserError(f"keep_classes: it is for COCO's files, {split} is a {cfg[split].type}")
        # On the command line names are given without spaces.
        known = {name.replace(" ", ""): name for name in classes_of(cfg, split)}
        kept = tuple(known.get(name.replace(" ", ""), name) for name in asked)
        cfg[split].metainfo = {**cfg[split].get("metainfo", {}), "classes": kept}
    for head in heads_of(cfg):
        head["num_classes"] = len(asked)


def check_classes(cfg: Config, split: str) -> None:
    """`UserError` if a COCO file's categories, the split's classes and the model's heads differ."""
    found = read_categories(cfg, split)
    if found is None:
        return
    classes = classes_of(cfg, split)
    check_categories(found, classes, chosen=bool(cfg.get("keep_classes")))
    for head in heads_of(cfg):
        if head["num_classes"] != len(classes):
            text = f"{split} has {len(classes)} classes, the model's {head['type']} {head['num_classes']}"
            raise UserError(f"{text}: set its num_classes")


def read_categories(cfg: Config, split: str) -> Categories | None:
    """The categories of a split's annotation file, which is checked; None if the data set is not COCO's."""
    data = cfg[split]
    if not reads_coco(registered(cfg, DATASETS, data.type, split)):
        return None
    root = Path(data.get("data_root") or "")
    measured = split == "val_dataset"
    metric = registered(cfg, METRICS, cfg.val_evaluator.type, "val_evaluator")
    masks = measured and "segm" in cfg.val_evaluator.get("metric", ())
    masks = masks or any(step.get("with_mask") for step in data.pipeline)
    return check_coco_file(
        root / data.ann_file, root / data.data_prefix["img"], masks, measured and not hasattr(metric, "any_id")
    )


def of_part(cfg: Config, split: str, found: Categories | None) -> Categories | None:
    """The categories with the annotations of a split alone, where the file's images are divided into parts."""
    data = cfg[split]
    if found is None or not data.get("part"):
        return found
    names = {record["id"]: record["file_name"] for record in read_json(Path(data.data_root) / data.ann_file)["images"]}
    kept = part_of(names.values(), data.part, data.held_out)
    return found.among({number for number, name in names.items() if name in kept})


def left_out(cfg: Config, *splits: str) -> dict[str, dict]:
    """What `keep_classes` leaves out of the splits, for results.json and the main process's log."""
    if not cfg.get("keep_classes") or not is_main_process():
        return {}
    found = ((split, of_part(cfg, split, read_categories(cfg, split))) for split in splits)
    return {"left_out": {split: part.left_out(classes_of(cfg, split)) for split, part in found if part is not None}}


def left_out_lines(counts: Mapping[str, dict]) -> list[str]:
    """Log lines for `left_out`."""
    return [
        f"keep_classes leaves out of {split}: {part['categories']} of {part['of_categories']} categories,"
        f" {part['annotations']:,} of {part['of_annotations']:,} annotations; {part['images']:,} images have no others"
        for split, part in counts.get("left_out", {}).items()
    ]
