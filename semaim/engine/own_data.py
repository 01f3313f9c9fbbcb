"""Data sets of one's own for detectors and segmentors: --data-root, --classes and --data change a config.

A description (`semaim.data.described`) is found in the folder or read from a YAML file, and kept in the config as
`own_data`, from which resumed runs make the same changes.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS

from semaim.data.described import BACKGROUND, Description, check_description, classes_and_values, ignored_values
from semaim.data.describing import describe, paired
from semaim.data.findings import shortened
from semaim.data.layouts import NotFound
from semaim.drawing.objects import default_colour
from semaim.engine.classes import heads_of, reads_coco, registered, takes, without_masks
from semaim.engine.config import data_roots, set_data_root, top_keys
from semaim.errors import UserError

SPLITS = {"train_dataset": "train", "val_dataset": "val"}
GREY = (128, 128, 128)
#: COCO's metrics -> those of a part of a file.
OF_PART = {"CocoMetric": "PartCocoMetric", "FasterCocoMetric": "PartFasterCocoMetric"}
#: Arguments of data sets that a description decides; the others, such as the pipeline, stay.
DECIDED = {
    "type", "data_root", "ann_file", "data_prefix", "metainfo", "img_suffix", "seg_map_suffix", "reduce_zero_label",
    "values", "ignored", "part", "held_out", "image_suffix", "label_suffix",
}  # fmt: skip


def set_data(cfg: Config, root: str | None, file: str | None = None, classes: str | None = None) -> dict[str, Any]:
    """Have a config read the data of --data-root, --data and --classes; returns what was set, as --cfg-options.

    A folder that has the config's own files is read as the config says, unless there are --data or --classes.
    """
    named = [name.strip() for name in classes.split(",")] if classes is not None else None
    if "own_data" not in top_keys(cfg):
        if file or classes:
            flag = "--data" if file else "--classes"
            raise UserError(f"{flag} is for detectors and segmentors: class folders, --data-root DIR, name the classes")
        if root:
            set_data_root(cfg, root)
        return data_roots(cfg, root) if root else {}
    if file is None and named is None:
        if root is None:
            return {}
        if has_own(cfg, root):
            set_data_root(cfg, root)
            if cfg.get("own_data"):
                cfg.own_data.root = root
            return data_roots(cfg, root) | ({"own_data.root": root} if cfg.get("own_data") else {})
    try:
        description = describe(kind_of(cfg), root, file, named)
    except NotFound:
        if file or named or cfg.get("own_data") is not None or not os.path.isdir(root or ""):
            raise
        set_data_root(cfg, str(root))  # what is missing is reported in the config's terms
        return data_roots(cfg, str(root))
    use(cfg, description)
    return {"own_data": description}


def has_own(cfg: Config, root: str) -> bool:
    """Whether a folder has a file or folder that the config names for a split, so that its layout is the config's."""
    if cfg.get("own_data") == {} or not os.path.isdir(root):
        return cfg.get("own_data") != {}
    for split in SPLITS:
        data = cfg[split]
        prefix = data.get("data_prefix") or {}
        if any(os.path.exists(os.path.join(root, path)) for path in (data.get("ann_file"), *prefix.values()) if path):
            return True
    return False


def kind_of(cfg: Config) -> str:
    """The key of a description that a config's data sets read: annotations or labels."""
    kind = registered(cfg, DATASETS, cfg.train_dataset.type, "train_dataset")
    if reads_coco(kind):
        return "annotations"
    if takes(kind, "seg_map_suffix"):
        return "labels"
    raise UserError(f"{cfg.filename}: --classes and --data are for COCO's files and label maps, not {kind.__name__}")


def use(cfg: Config, description: Mapping[str, Any]) -> None:
    """Change a config so that it reads these data: both data sets, sizes of the heads, the metric, without masks."""
    coco = "annotations" in description["train"]
    names, values = (description["classes"], []) if coco else classes_and_values(description)
    palette = description.get("palette") or default_palette(names)
    share = None if "val" in description else description["held_out"]
    for split, name in SPLITS.items():
        part = description.get(name) or description["train"]
        data = {key: value for key, value in cfg[split].items() if key not in DECIDED}
        data |= {"data_root": description["root"], "metainfo": {"classes": tuple(names), "palette": palette}}
        if share is not None:
            data |= {"part": name, "held_out": share}
        if coco:
            data |= {"type": "PartOfCoco" if share is not None else "CocoDataset", "ann_file": part["annotations"]}
            data["data_prefix"] = {"img": part["images"]}
        else:
            data |= {"type": "OwnLabelMaps", "ann_file": part.get("list", "")}
            data["data_prefix"] = {"img_path": part["images"], "seg_map_path": part["labels"]}
            data |= {"values": values, "ignored": ignored_values(description)}
            data |= {key: description[key] for key in ("image_suffix", "label_suffix") if key in description}
        cfg[split] = ConfigDict(data)
    if coco:
        cfg.val_evaluator = {**cfg.val_evaluator, "type": metric_of_part(cfg.val_evaluator)}
    for head in heads_of(cfg):
        head["num_classes"] = len(names)
    if not description.get("masks", True):
        without_masks(cfg)
    cfg.pop("most_ignored", None)  # of the config's own data
    cfg.own_data = ConfigDict(description)


def default_palette(names: Sequence[str]) -> list[list[int]]:
    """Red, green, blue of each class where the data have no colours; grey for a background, to set off the others."""
    return [list(GREY if name.lower() == BACKGROUND else default_colour(label)) for label, name in enumerate(names)]


def metric_of_part(metric: Any) -> str:
    """The metric that measures a part of a COCO file; `UserError` for one that would count the rest as missed."""
    given = metric.get("type") if isinstance(metric, Mapping) else metric
    for name, own in OF_PART.items():
        if given in (name, own):
            return own
    raise UserError(f"val_evaluator is {given!r}: annotation files of your own are measured by {' or '.join(OF_PART)}")


def check_named(cfg: Config) -> None:
    """`UserError` if a config is for own data, and none are named."""
    if cfg.get("own_data") == {}:
        raise UserError(
            f"{cfg.filename or 'the config'} is for data of your own: name them with --data-root DIR, and the classes"
            " of label maps with --classes NAME,...; after its training, give the config in its work folder"
        )


def lines(cfg: Config, sizes: Mapping[str, int]) -> list[str]:
    """Log lines about the own data of a run; `sizes` are the numbers of images of its splits."""
    own = cfg.get("own_data")
    if not own:
        return []
    names = cfg.train_dataset.metainfo.classes
    found = [f"own data in {own.root}: {len(names)} classes, {shortened(list(names))}"]
    if "val" in own:
        found += [
            f"{name}: {', '.join(f'{key} {path}' for key, path in own[name].items())}" for name in SPLITS.values()
        ]
    else:
        among = ", ".join(f"{key} {path}" for key, path in own.train.items())
        counts = ", ".join(f"{count:,} images for {split.partition('_')[0]}" for split, count in sizes.items())
        found += [f"no validation split in {among}: {own.held_out:.0%} held out by the images' names: {counts}"]
    if not own.get("masks", True):
        found.append("boxes alone are learned and measured, no masks (own_data.masks)")
    if "labels" in own.train:
        for name in SPLITS.values():
            if name in own and (bare := paired(own, name)[1]):
                text = f"{len(bare)} images of {name} have no label map and are left out: {shortened(bare, 3)}"
                found.append(f"warning: {text}")
    return found


def recorded(cfg: Config) -> dict[str, Any]:
    """What results.json has about own data; empty for others."""
    return {"own_data": cfg.own_data.to_dict()} if cfg.get("own_data") else {}


def checked(description: Any, where: str) -> Description:
    """A description from a checkpoint, which is not trusted; `UserError` if it is none."""
    plain = description.to_dict() if isinstance(description, ConfigDict) else description
    found = check_description(plain, where)
    if not {"root", "train", "classes"} <= found.keys() or not ({"val", "held_out"} & found.keys()):
        raise UserError(f"{where}: own_data is incomplete")
    return found
