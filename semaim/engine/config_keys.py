"""Which keys a config may have: arguments of its types, and in dicts without a type the keys that are read."""

import importlib
import importlib.util
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from mmengine.config import Config
from mmengine.registry import Registry
from torch import nn

from semaim.errors import UserError, close, nearest
from semaim.registry import SCOPE, TASKS, Method

Built = Callable[..., Any]  #: what a `type` names: a class or a builder function

#: Keys next to a `type` that its builder takes, not the class itself: of optimizers, hooks, norms, deconvolutions,
#: initialisations and NMS.
BUILDER_KEYS = {
    "type", "constructor", "paramwise_cfg", "priority", "requires_grad", "scale_factor", "override", "class_agnostic",
    "split_thr",
}  # fmt: skip

#: Keys whose content belongs to another library, or has user-defined names.
FOREIGN = {
    "override", "backend_args", "file_client_args", "init_kwargs", "origin", "cfg_options", "overrides", "own_data",
}  # fmt: skip

#: Dicts that take keys which the config does not have yet: names of tasks, which are checked when they are used.
OPEN = {"evaluations"}

#: Free dicts (those without a type): key -> the keys that are read.
FREE = {
    "clip_grad": {"type", "max_norm", "norm_type", "clip_value", "error_if_nonfinite", "foreach"},
    "filter_cfg": {"filter_empty_gt", "min_size", "bbox_min_size"},
    "data_prefix": {"img", "seg", "img_path", "seg_map_path"},
    "metainfo": {"classes", "palette", "label_map", "reduce_zero_label", "dataset_type", "task_name"},
}

_PROPOSALS = {"nms_pre", "max_per_img", "nms", "min_bbox_size"}
_TRAINED = {"assigner", "sampler", "pos_weight", "debug"}
#: What mmdet 3.3's two-stage detectors and mmseg 1.2's segmentors read from a model's train_cfg and test_cfg.
DETECTOR = {
    "model.train_cfg": {"rpn", "rpn_proposal", "rcnn"},
    "model.train_cfg.rpn": {*_TRAINED, "allowed_border"},
    "model.train_cfg.rpn_proposal": _PROPOSALS,
    "model.train_cfg.rcnn": {
        *_TRAINED, "mask_size", "isr", "carl", "dynamic_rcnn", "num_points", "oversample_ratio",
        "importance_sample_ratio", "pos_radius", "max_num_grid",
    },
    "model.test_cfg": {"rpn", "rcnn"},
    "model.test_cfg.rpn": _PROPOSALS,
    "model.test_cfg.rcnn": {
        "score_thr", "nms", "max_per_img", "mask_thr_binary", "subdivision_steps", "subdivision_num_points",
        "scale_factor",
    },
}  # fmt: skip
SEGMENTOR = {
    "model.train_cfg": {"assigner", "sampler", "num_points", "oversample_ratio", "importance_sample_ratio"},
    "model.test_cfg": {
        "mode", "crop_size", "stride", "subdivision_steps", "subdivision_num_points", "scale_factor",
    },
}  # fmt: skip

#: Settings that must be integers: path -> least value.
WHOLE = {
    "total_batch_size": 1,
    "images_per_gpu": 1,
    "base_batch_size": 1,
    "num_workers": 0,
    "seed": 0,
    "train_cfg.max_epochs": 1,
    "train_cfg.max_iters": 1,
    "train_cfg.val_interval": 1,
    "default_hooks.checkpoint.interval": 1,
    "default_hooks.checkpoint.keep": 0,
    "default_hooks.logger.interval": 1,
}

#: Keys that a run sets itself -> what to set instead.
SET_BY_RUN = {
    "optim_wrapper.optimizer.lr": "base_lr, the rate for the base batch size,",
    "optim_wrapper.accumulative_counts": "images_per_gpu",
}

#: Names used elsewhere, or in configs of another kind -> their names here.
ALIASES = {
    "lr": "base_lr",
    "batch_size": "total_batch_size",
    "epochs": "max_epochs",
    "max_iters": "max_epochs",
    "iters": "max_iters",
    "max_epochs": "max_iters",
}

#: Removed keys, as patterns of whole paths -> what replaces them.
REMOVED = {
    r"param_scheduler\.warmup_epochs": "param_scheduler.warmup, a share of the run: 0.05 for 40 of 800 epochs",
    r"param_scheduler\.\d+(\..*)?": "param_scheduler, one dict whose warmup and milestones are shares of the run",
}

#: Arguments of `group_parameters` that come from the model and the optimizer.
OF_THE_MODEL = {"model", "parameters", "lr", "weight_decay", "depth_of", "norms"}

#: Packages that writers of scalars import when they write first.
PACKAGES = {
    "WandbVisBackend": "wandb",
    "MLflowVisBackend": "mlflow",
    "ClearMLVisBackend": "clearml",
    "NeptuneVisBackend": "neptune",
    "DVCLiveVisBackend": "dvclive",
    "AimVisBackend": "aim",
}


class Types:
    """Looks up the types in a scope's configs: the class or function of a name, and its arguments.

    Args:
        scope: the package whose registries are searched before mmengine's; its modules must have been imported.
    """

    def __init__(self, scope: str = SCOPE):
        self.scope, self.located = scope, False
        modules = dict.fromkeys((f"{scope}.registry", "mmengine.registry"))
        found = (vars(importlib.import_module(module)).values() for module in modules)
        registries = {id(r): r for part in found for r in part if isinstance(r, Registry) and r is not TASKS}.values()
        self.registries = sorted(registries, key=lambda registry: registry.scope != scope)  # its own come first

    def names(self) -> set[str]:
        """All names of types."""
        return {name for registry in self.registries for name in registry.module_dict}

    def find(self, name: str | Built | None) -> Built | None:
        """The class or function that a `type` names, or None."""
        if not isinstance(name, str):
            return name  # a Python config may contain the class itself
        name = name.removeprefix(f"{self.scope}.")
        for registry in self.registries:
            if name in registry.module_dict:
                return registry.module_dict[name]
        if self.scope != SCOPE:  # operators such as RoIAlign and nms are in no registry
            found = getattr(importlib.import_module("mmcv.ops"), name, None)
            if found is None and not self.located:
                self.located = True
                for registry in self.registries:
                    registry.import_from_location()
                return self.find(name)
            return found
        return None

    def arguments(self, node: Mapping) -> set[str] | None:
        """Names of the keys that a dict with a `type` may have; None if any."""
        built = self.find(node["type"])
        if built is None:
            return None
        known, closed = arguments(built)
        if not closed:  # further arguments go to the type that another argument names, as RandomResize's to Resize
            defaults = {name: p.default for name, p in inspect.signature(built_by(built)).parameters.items()}
            others = [self.find(node.get(name, value)) for name, value in defaults.items() if isinstance(value, str)]
            passed = [arguments(other)[0] for other in others if other is not None]
            if not passed:
                return None
            known = known.union(*passed)
        return known | BUILDER_KEYS


def initialisers(kind: type) -> list[Built]:
    """The `__init__` of a class and of all its base classes."""
    # Any: mypy rejects access to `__init__` of an arbitrary class as unsafe.
    bases: tuple[Any, ...] = inspect.getmro(kind)
    return [base.__init__ for base in bases if base is not object]


def arguments(built: Built) -> tuple[set[str], bool]:
    """Names of the arguments that a class or builder takes, with base classes, and whether the list is complete."""
    names: set[str] = set()
    built = built_by(built)
    pending = initialisers(built) if inspect.isclass(built) else [built]
    for function in pending:
        if function is nn.Module.__init__:
            break  # it takes **kwargs only to refuse them
        try:
            parameters = inspect.signature(function).parameters.values()
        except ValueError:
            return names, False
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break  # nothing is passed further up
        if hasattr(function, "arguments_of"):
            passes_to = function.arguments_of
            names |= arguments(passes_to)[0] if passes_to else set()
            if function is pending[-1]:
                break
    else:
        return names - {"self"}, False
    return names - {"self"}, True


def built_by(built: Built) -> Built:
    """The class or builder itself; for a pretraining method its network, whose arguments the config gives."""
    return built.network if inspect.isclass(built) and issubclass(built, Method) and built.network else built


def check_tree(cfg: Config, types: Types) -> None:
    """`UserError` for an unknown type, argument of a type, or key of a free dict."""
    _check(cfg.to_dict(), "", types, free_dicts(cfg, types))


def free_dicts(cfg: Mapping, types: Types) -> dict[str, set[str]]:
    """Path of a dict without a type -> the keys that are read, for the model that the config describes."""
    found: dict[str, set[str]] = {}
    model = cfg.get("model")
    known = types.arguments(model) if isinstance(model, Mapping) and "type" in model else None
    if {"rpn_head", "roi_head"} <= (known or set()):
        found |= DETECTOR
    elif "decode_head" in (known or set()):
        found |= SEGMENTOR
    wrapper = cfg.get("optim_wrapper")
    constructor = types.find(wrapper.get("constructor")) if isinstance(wrapper, Mapping) else None
    if grouping := getattr(constructor, "arguments_of", None):
        found["optim_wrapper.paramwise_cfg"] = arguments(grouping)[0] - OF_THE_MODEL
    return found


def known_keys(node: Mapping, path: str, types: Types, free: Mapping[str, set[str]]) -> set[str] | None:
    """Keys that the dict at a path may have; None if any."""
    if "type" in node and path.rpartition(".")[2] not in FREE:
        return types.arguments(node)
    table = re.sub(r"(\.\d+)+$", "", path)  # a cascade has a list of them
    if table in free:
        return free[table]
    return FREE.get(path.rpartition(".")[2])


def _check(node: object, path: str, types: Types, free: Mapping[str, set[str]]) -> None:
    if isinstance(node, list | tuple):
        for index, item in enumerate(node):
            _check(item, f"{path}.{index}", types, free)
    if not isinstance(node, dict):
        return
    if path and "type" in node and path.rpartition(".")[2] not in FREE:
        _check_type(node["type"], path, types)
    known = known_keys(node, path, types, free) if path else None
    for key, item in node.items():
        if known is not None and key not in known:
            _refuse_removed(f"{path}.{key}")
            raise UserError(f"unknown config key {path}.{key}: {nearest(str(key), known - BUILDER_KEYS)}")
        if key not in FOREIGN:
            _check(item, f"{path}.{key}" if path else str(key), types, free)


def _check_type(name: str | Built, path: str, types: Types) -> None:
    built = types.find(name)
    if built is None and not (isinstance(name, str) and "." in name):  # another package reports it itself
        near = close(str(name), types.names(), cutoff=0.8 if types.scope != SCOPE else 0.5)
        if near or types.scope == SCOPE:
            raise UserError(f"unknown type {name!r} in {path}: {nearest(str(name), near or types.names())}")
    for base in inspect.getmro(built) if inspect.isclass(built) else ():
        needed = PACKAGES.get(base.__name__)
        if needed and importlib.util.find_spec(needed) is None:
            raise UserError(f"{path}: {name} needs {needed}, which is missing: pip install {needed}, or leave it out")


def check_options(cfg: Config, options: Mapping[str, object], top: Iterable[str], types: Types | None) -> None:
    """`UserError` for an option KEY=VALUE with an unknown key or a value of the wrong kind.

    Args:
        cfg: before the options are merged.
        options: dotted path -> value.
        top: the keys allowed at its top level.
        types: of its scope; None if they cannot be looked up.
    """
    tree = cfg.to_dict()
    free = free_dicts(tree, types) if types else {}
    for path, value in options.items():
        if path in SET_BY_RUN:
            raise UserError(f"--cfg-options {path}: the run sets it: set {SET_BY_RUN[path]} in its place")
        node, at, parts = tree, "", path.split(".")
        for part in parts:
            known = set(top) - FOREIGN if not at else None
            if isinstance(node, list | tuple):
                if not (part.isdigit() and int(part) < len(node)):
                    raise UserError(f"--cfg-options {path}: {at} is a list of {len(node)}: give 0 to {len(node) - 1}")
                node, at = node[int(part)], f"{at}.{part}"
                continue
            if not isinstance(node, dict):
                held = f"{at} is {node!r}" if node is not None else f"{at} is None in this config"
                raise UserError(f"--cfg-options {path}: {held}, which has no keys")
            if at:
                known = known_keys(node, at, types, free) if types else None
                if known is None and "type" not in node and at not in OPEN:
                    known = set(node)
            if part not in node and known is not None and part not in known:
                _refuse_removed(path)
                hint = _hint(path, part, at, known - BUILDER_KEYS, tree, types)
                raise UserError(f"unknown config key {path}: {hint}")
            if part not in node:
                _check_kind(path, value, _default(node, part, types))
                break
            node, at = node[part], f"{at}.{part}" if at else part
        else:
            _check_kind(path, value, node)


def _refuse_removed(path: str) -> None:
    """`UserError` for a removed key."""
    for pattern, now in REMOVED.items():
        if re.fullmatch(pattern, path):
            raise UserError(f"unknown config key {path}: there is no such key any more: set {now}")


def _places(node: object, types: Types | None, path: str = "") -> Iterator[str]:
    """Paths of all existing keys, and of the arguments that could be given."""
    if isinstance(node, list | tuple):
        for index, item in enumerate(node):
            yield from _places(item, types, f"{path}.{index}")
    if not isinstance(node, dict):
        return
    possible = types.arguments(node) if types and "type" in node and path else None
    for key in dict.fromkeys((*node, *sorted((possible or set()) - BUILDER_KEYS))):
        here = f"{path}.{key}" if path else str(key)
        if key not in FOREIGN:
            yield here
            yield from _places(node.get(key), types, here)


def _hint(path: str, part: str, at: str, known: set[str], tree: dict, types: Types | None) -> str:
    """The nearest key: a sibling or, if the path went wrong higher up, the same or a similar key elsewhere."""
    leaf, top = path.rpartition(".")[2], path.partition(".")[0]
    if at and path == f"{at}.{part}" and close(part, known):
        return nearest(part, known)
    there, possible = set(_places(tree, None)), set(_places(tree, types))
    if at and any(place.startswith(f"{top}.") and place.endswith(f".{leaf}") for place in possible):
        possible = {place for place in possible if place.startswith(f"{top}.")}
        there &= possible

    def named(names: Iterable[str], places: set[str]) -> list[str]:
        found = [place for place in places if place.rpartition(".")[2] in names]
        return sorted(found, key=lambda place: (place.count("."), place))[:3]

    found = named([leaf], there) or named([ALIASES.get(leaf, leaf)], there) or named([leaf], possible)
    if not found and not close(part, known, cutoff=0.75):
        names = {place.rpartition(".")[2] for place in there}
        found = named(close(leaf, names, cutoff=0.63)[:1], there)
    return f"did you mean {' or '.join(found)}?" if found else nearest(part, known)


def _default(node: Mapping, name: str, types: Types | None) -> object:
    """The default of an argument of a type."""
    named = types.find(node["type"]) if types and "type" in node else None
    built = built_by(named) if named is not None else None
    for function in initialisers(built) if inspect.isclass(built) else ():
        found = inspect.signature(function).parameters.get(name)
        if found is not None:
            if found.default in (None, found.empty) and found.annotation in (int, float, int | None, float | None):
                return 0
            return None if found.default is found.empty else found.default
    return None


def _check_kind(path: str, value: object, had: object) -> None:
    """`UserError` for text in place of a number or a bool, and for a value in place of a dict."""
    deeper = type(None) if "." in path else Mapping  # a nested dict may be switched off by None
    if isinstance(had, Mapping) and had and not isinstance(value, Mapping | list | tuple | deeper):
        raise UserError(f"--cfg-options {path}={value}: {path} has keys: set {path}.{next(iter(had))} or another")
    if isinstance(had, list | tuple) and any(isinstance(part, Mapping) for part in had) and isinstance(value, str):
        raise UserError(f"--cfg-options {path}={value}: {path} is a list: set {path}.0 to {path}.{len(had) - 1}")
    if isinstance(value, str) and isinstance(had, int | float) and path != "compile":  # which may be "auto"
        kind = "True or False" if isinstance(had, bool) else "a number"
        raise UserError(f"--cfg-options {path}={value}: {path} is {kind}")


def check_numbers(cfg: Config) -> None:
    """`UserError` for an impossible number, such as a batch of 0 images."""
    for path, least in WHOLE.items():
        *above, last = path.split(".")
        holder = cfg
        for part in above:
            holder = holder.get(part) if isinstance(holder, Mapping | Config) else None
        if not isinstance(holder, Mapping | Config) or last not in holder:
            continue
        node = holder[last]
        if isinstance(node, bool) or not isinstance(node, int) or node < least:
            raise UserError(f"{path} is {node!r}: give a whole number, {least} or more")
    rate = cfg.get("base_lr")
    if rate is not None and not (isinstance(rate, int | float) and 0 <= rate < math.inf):
        raise UserError(f"base_lr is {rate!r}: give a number, 0 or more")
    if cfg.get("compile", False) not in (True, False, "auto"):
        raise UserError(f"compile is {cfg.compile!r}: give True, False or auto")
    share = cfg.get("most_ignored")
    if share is not None and not (isinstance(share, int | float) and 0 <= share <= 1):
        raise UserError(f"most_ignored is {share!r}: give a share, from 0 to 1")
    ratios = cfg.get("tta_ratios", (1,))
    listed = isinstance(ratios, list | tuple) and len(ratios) > 0
    if not listed or not all(isinstance(ratio, int | float) and ratio > 0 for ratio in ratios):
        raise UserError(f"tta_ratios is {ratios!r}: give a list of numbers above 0, such as [1.0,1.5]")
