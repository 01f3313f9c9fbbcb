"""Settings of a resumed run: those in its checkpoint take precedence over the config and the command line."""

import copy
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mmengine.config import Config

from semaim.checkpoints.files import read_checkpoint
from semaim.engine import own_data
from semaim.engine.classes import keep_classes
from semaim.engine.config import check_keys, merge, top_keys, types_of
from semaim.engine.results import config_name
from semaim.engine.saving import choose_checkpoint
from semaim.errors import UserError

#: Settings that a resumed run may change without --override: where and how it computes, writes and logs. Patterns of
#: whole paths.
FREE = re.compile(
    r"work_dir|num_workers|images_per_gpu|compile|fsdp|(log_processor|visualizer|trackers)(\..*)?"
    r"|default_hooks\.(logger|timer|checkpoint|pictures|progress|runtime_info)(\..*)?|.*\.with_cp"
)

#: Keys that are not settings but records that the run itself has added.
RECORDED = re.compile(
    r"(origin|cfg_options|overrides)(\..*)?|statistics_from|allow_partial|work_dir|optim_wrapper\.optimizer\.lr|optim_wrapper\.accumulative_counts"
)

#: Settings that the run fills in from the weights it starts from, if the config leaves them open.
FILLED = re.compile(
    r"(dataset|model\.data_preprocessor)\.(mean|std)|dataset\.(crop_pct|crop_mode|interpolation)"
    r"|model\.network\.img_size|model\.(neck|decode_head|auxiliary_head)\.(in_channels|embed_dim)|model\.(network|backbone)\.encoder(\..*)?"
)

#: Last parts of keys that name what is built. They are taken from the config and the command line, never from a file.
NAMES_CODE = ("type", "constructor", "resize_type", "imports", "task")

#: Last parts of keys that are paths.
PLACES = ("root", "data_root", "pretrained")

ABSENT = type("Absent", (), {"__repr__": lambda self: "not set"})()
SHOWN = 8  #: differences that an error lists at most


def resume_settings(
    cfg: Config, given: Mapping[str, object], resume: str | None, override: bool = False
) -> tuple[str | None, list[str]]:
    """The checkpoint to resume from, or None, and log lines; sets the config to the run's own settings.

    Args:
        cfg: the config with the options of the command line; names the work folder. Changed in place.
        given: the options of the command line: dotted path -> value.
        resume: as for `choose_checkpoint`.
        override: given options replace the run's own values; both are recorded in `cfg.overrides`.
    """
    if override and resume is None:
        raise UserError("--override is for --resume: it lets what is given here change the run")
    path = choose_checkpoint(cfg, resume)
    if path is None:
        return None, [f"--resume: no checkpoint in {cfg.work_dir}: the run starts anew"] if resume else []
    return path, own_settings(cfg, given, read_checkpoint(path, mmap=True), path, override)


def own_settings(
    cfg: Config, given: Mapping[str, object], checkpoint: Mapping, path: str, override: bool = False
) -> list[str]:
    """Set the config to that of the checkpoint's run; returns log lines. Arguments as for `resume_settings`.

    The file's config is not trusted: it gives values, but names nothing to build that the config does not name.
    """
    if "optimizer" not in checkpoint or not isinstance(checkpoint.get("config"), Mapping):
        raise UserError(f"{path} holds weights and no run to resume: start from it with --pretrained")
    saved = _saved(checkpoint["config"], cfg)
    given = dict(given)
    own: Any = given.pop("own_data", None)  # of the command line: a description, not a change of one key
    now = _entered(cfg, saved.get("keep_classes"), own or saved.get("own_data"), path)
    first, noted, origin = (_mapping(saved.get(key)) for key in ("cfg_options", "overrides", "origin"))
    after = Config(copy.deepcopy(saved))
    if own:
        own_data.use(after, own)
    merge(after, copy.deepcopy(dict(given)))
    settings = after.to_dict()
    changed, kept = differences(saved, settings), differences(now, settings)
    strict = {key: pair for key, pair in changed.items() if not FREE.fullmatch(key)}
    if strict and not override or "pretrained" in strict:
        _refuse(strict, path)
    # Differences from the current config were given at the start; or the config file is another, or was edited.
    kept = {key: pair for key, pair in kept.items() if _given(key, first) or not FILLED.fullmatch(key)}
    edited = {key: pair for key, pair in kept.items() if not _given(key, first)}
    _check_same(kept, edited, first, origin.get("config"), config_name(cfg), path)

    lines = [
        f"continues with the run's own settings, {why}: {_listed(part)}"
        for why, part in (
            ("given at its start", {key: new for key, (_, new) in kept.items() if key not in edited}),
            ("which are different in the config now", {key: new for key, (_, new) in edited.items()}),
        )
        if part
    ]
    lines += [f"--override: {key} = {_plain(new)}, was {_plain(old)}" for key, (old, new) in strict.items()]
    if free := {key: new for key, (_, new) in changed.items() if key not in strict}:
        lines.append(f"changed from here on: {_listed(free)}")

    noted = dict(noted) | {key: [noted.get(key, [_plain(old)])[0], _plain(new)] for key, (old, new) in strict.items()}
    settings |= {"work_dir": cfg.work_dir, "cfg_options": {**first, **(cfg.get("cfg_options") or {})}}
    settings |= {"overrides": noted} if noted else {}
    settings |= {"allow_partial": True} if cfg.get("allow_partial") else {}
    for key in list(cfg):
        cfg.pop(key)
    for key, value in settings.items():
        cfg[key] = value
    check_keys(cfg, types_of(cfg))
    return lines


def check_data(path: str, data: Mapping[str, str], strict: bool) -> str | None:
    """A warning if the data are not those that the run of a checkpoint had, or None.

    Args:
        path: of the checkpoint.
        data: of the resumed run, from `semaim.engine.training.identities`.
        strict: `UserError` in place of the warning, also if the checkpoint does not say what its data were.
    """
    saved = read_checkpoint(path, mmap=True).get("data")
    if not isinstance(saved, Mapping):
        if strict:
            raise UserError(f"--strict-data: {path} does not record its data, so they cannot be compared: leave it out")
        return None
    changed = [split for split in data if saved.get(split) != data[split]]
    if not changed:
        return None
    what = f"the data ({' and '.join(changed)}) have changed since {path}: other files, names or sizes"
    if strict:
        raise UserError(f"--strict-data: {what}: put them back, or leave it out to continue with these")
    return f"{what}; the run continues with those that are there now (--strict-data refuses that)"


def _saved(config: Mapping, cfg: Config) -> dict:
    """A checkpoint's config without what the run filled in or the config cannot have."""
    saved = {key: copy.deepcopy(value) for key, value in config.items() if key in top_keys(cfg)}
    for key, value in _settings(saved):
        if not _is_plain(value):
            raise UserError(f"the checkpoint's config holds a {type(value).__name__} in {key}, where values are plain")
    network = _mapping(_mapping(saved.get("model")).get("network"))
    if "num_classes" in network and _mapping(_mapping(cfg.get("model")).get("network")).get("num_classes") is None:
        saved["model"]["network"]["num_classes"] = None  # the data determined it, and will again
    now = cfg.to_dict()
    for key, value in now.items():
        if key not in saved and FREE.fullmatch(key):
            saved[key] = value
    # Which writers and hooks run besides the training is up to the current config.
    for key in differences(saved, now):
        if FREE.fullmatch(key) and _last(key) in NAMES_CODE:
            top, part = key.split(".")[:2]
            if top == "default_hooks":
                saved[top][part] = copy.deepcopy(now[top].get(part))
            else:
                saved[top] = copy.deepcopy(now[top])
    return saved


def _entered(cfg: Config, kept: object, own: object, path: str) -> dict:
    """The config as changed at the start of a run with this `keep_classes` and own data; `path` is the run's file."""
    now = Config(cfg.to_dict())
    if own and "own_data" in top_keys(cfg):
        own_data.use(now, own_data.checked(own, path))
    if kept and "keep_classes" in top_keys(cfg):
        now.keep_classes = kept
        keep_classes(now)
        now.keep_classes = cfg.get("keep_classes")
    return now.to_dict()


def differences(old: Mapping, new: Mapping) -> dict[str, tuple[object, object]]:
    """Path of a setting -> its two values, if they differ; `ABSENT` for a missing one."""
    before, after = dict(_settings(old)), dict(_settings(new))
    found = {}
    for key in dict.fromkeys((*before, *after)):
        pair = before.get(key, ABSENT), after.get(key, ABSENT)
        if not RECORDED.fullmatch(key) and not _same(key, *pair):
            found[key] = pair
    # If a dict replaces None, its keys are reported.
    return {key: pair for key, pair in found.items() if ABSENT not in pair or not _inside(key, found)}


def _settings(node: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Paths and values of everything except dicts and lists of dicts."""
    if isinstance(node, Mapping) and node:
        for key, item in node.items():
            yield from _settings(item, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list | tuple) and any(isinstance(item, Mapping) for item in node):
        for index, item in enumerate(node):
            yield from _settings(item, f"{path}.{index}")
    else:
        yield path, node


def _same(key: str, old: object, new: object) -> bool:
    if isinstance(old, str) and isinstance(new, str) and _last(key) in PLACES:
        return old == new or os.path.realpath(old) == os.path.realpath(new)
    return _plain(old) == _plain(new) and (old is ABSENT) == (new is ABSENT)


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _plain(value: object) -> object:
    """A value in JSON's types."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if value is ABSENT else value


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or value == {} or isinstance(value, bool | int | float | str)


def _inside(key: str, keys: Iterable[str]) -> bool:
    return any(other.startswith(f"{key}.") for other in keys)


def _given(key: str, options: Iterable[str]) -> bool:
    """Whether the run's first command line gave a setting: by --cfg-options, or by the flag of a path or a tracker."""
    by_flag = _last(key) in PLACES or key.startswith("trackers")
    return by_flag or any(f"{key}.".startswith(f"{option}.") for option in options)


def _listed(part: Mapping[str, object]) -> str:
    by_weight = sorted(part.items(), key=lambda item: bool(FREE.fullmatch(item[0])))  # what affects the result first
    return ", ".join(f"{key} = {value}" for key, value in by_weight)


def _refuse(strict: Mapping[str, tuple[object, object]], path: str) -> None:
    """`UserError` for given options that differ from the run's own."""
    if "pretrained" in strict:
        old, new = strict["pretrained"]
        begun = "random weights" if old in (None, ABSENT) else old
        raise UserError(
            f"--pretrained {new}: the run in {path} started from {begun} and continues from its own weights: leave it"
            " out, or start anew in another --work-dir"
        )
    flags = {"root": " (--data-root)", "data_root": " (--data-root)"}
    changes = [f"{key} = {old}, given is {new}{flags.get(_last(key), '')}" for key, (old, new) in strict.items()]
    more = f" and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
    raise UserError(
        f"--resume: {path} has {'; '.join(changes[:SHOWN])}{more}: leave it out to keep the run's value, or add"
        " --override"
    )


def _check_same(
    kept: Mapping[str, tuple[object, object]],
    edited: Mapping[str, tuple[object, object]],
    first: Mapping[str, object],
    begun: object,
    name: str | None,
    path: str,
) -> None:
    """`UserError` for a different config than the run's."""
    if edited and isinstance(begun, str) and begun != name:
        raise UserError(
            f"--resume: {path} was begun with {begun}, not with {name}, which has others of its settings, such as"
            f" {next(iter(edited))}: resume it with its own config"
        )
    for key, (new, old) in kept.items():
        if _last(key) in NAMES_CODE:
            again = [f"{option}={value}" for option, value in first.items() if _given(key, [option])]
            how = f"give --cfg-options {' '.join(again)}" if again else f"resume it with the config {begun} as it was"
            raise UserError(
                f"--resume: {path} has {key} = {old}, the config {new}; what is built is taken from no file: {how}"
            )


def _mapping(value: object) -> Mapping:
    """A mapping unchanged, anything else as an empty one."""
    return value if isinstance(value, Mapping) else {}
