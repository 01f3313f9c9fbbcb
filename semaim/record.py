"""`results.json`: what a run measured, and what the figures depend on. The engine writes it; all else reads it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from semaim.errors import UserError
from semaim.reading import read_json, write_json

FILE = "results.json"  #: in a run's work folder


@dataclass(frozen=True)
class Record:
    """One results.json. None means not recorded, or recorded as none; `given` distinguishes the two.

    Args:
        metrics: figure by key; the task defines which of them are in the table, and their units.
        config: file name of the config, with its folder if it is not one of the suite's.
        method: of the pretraining, as published.yaml spells it; None for random and for unknown weights.
        backbone: such as ViT-B.
        task: title of the task.
        reported: the task's metrics as fields of `semaim.registry.Metric`, for readers that do not know the task.
        checkpoint: whose weights were measured or started from; None for random ones.
        pretrain_config, pretrain_epochs, pretrain_images, pretrain_options: how those weights were trained.
        partly_loaded: in words, what was left out when an encoder was loaded.
        load_report: numbers of loaded tensors, by kind.
        data: folder of the images.
        train_images, val_images: number of images trained on (or searched) and evaluated on.
        mean, std, statistics_from: of the pixels, from 0 to 1, and their origin.
        seed: of the run.
        cfg_options: changes to the config. overrides: what --override changed in a resumed run.
        epochs, iterations: length of the training.
        precision: what the network computed in, bf16 or fp32; of a detector's or segmentor's training.
        stage: of a test, what was done. features: which features of an encoder were measured.
        scales: image scales that predictions are averaged over, each also flipped.
        classes_evaluated, classes: number of classes in the mean, and of all classes.
        classwise: figures of each class, kind -> class -> percent, such as "IoU"; None for a class that has none.
        left_out: what keep_classes leaves out of the annotations.
        commit, device, semaim, torch, date: code, machine and time.
        more: anything else in the file.
        given: the keys in the file.
    """

    metrics: dict[str, float]
    config: str | None = None
    method: str | None = None
    backbone: str | None = None
    task: str | None = None
    reported: dict[str, dict] | None = None
    checkpoint: str | None = None
    pretrain_config: str | None = None
    pretrain_epochs: float | None = None
    pretrain_images: float | None = None
    pretrain_options: dict[str, Any] | None = None
    partly_loaded: str | None = None
    load_report: dict | None = None
    allow_partial: bool | None = None
    data: str | None = None
    train_images: float | None = None
    val_images: float | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    statistics_from: str | None = None
    seed: float | None = None
    cfg_options: dict[str, Any] | None = None
    overrides: dict[str, Any] | None = None
    epochs: float | None = None
    iterations: float | None = None
    precision: str | None = None
    stage: str | None = None
    features: str | None = None
    scales: list[float] | None = None
    classes_evaluated: float | None = None
    classes: float | None = None
    classwise: dict[str, dict] | None = None
    left_out: dict | None = None
    commit: str | None = None
    device: str | None = None
    semaim: str | None = None
    torch: str | None = None
    date: str | None = None
    more: dict[str, Any] = field(default_factory=dict)
    given: frozenset[str] = frozenset()

    def values(self) -> dict[str, Any]:
        """Everything in the file except the metrics, by key."""
        held = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name in self.given}
        return {key: value for key, value in (held | self.more).items() if key != "metrics"}

    def write(self, folder: Path) -> None:
        """Write it to a folder atomically; values of None are left out unless they are in `given`."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values = {key: value for key, value in values.items() if value is not None or key in self.given}
        values |= values.pop("more")
        del values["given"]
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FILE, values)


def _kind(annotation: Any) -> type | UnionType:
    """The type a value must have: `float | None` -> a number, `dict[str, Any] | None` -> a dict."""
    (held,) = [part for part in get_args(annotation) if part is not NoneType]
    kind = get_origin(held) or held
    return int | float if kind is float else kind


def read_record(path: Path) -> Record:
    """The record in a results.json; `UserError` if the file is not one."""
    try:
        raw = read_json(path)
    except FileNotFoundError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not isinstance(raw.get("metrics"), dict):
        raise UserError(f"{path} is none of our results: it has no metrics")
    kinds = {entry.name: _kind(entry.type) for entry in fields(Record) if entry.default is None}
    values = [(name, value, kinds[name]) for name, value in raw.items() if name in kinds and value is not None]
    for name in ("scales", "mean", "std"):
        if raw.get(name) is not None:
            numbers = raw[name] if isinstance(raw[name], list) and raw[name] else [None]
            values += [(name, value, int | float) for value in numbers]
    infinite = [(name, value) for name, value, _ in values if isinstance(value, float) and not math.isfinite(value)]
    values += [(f"metrics.{name}", value, int | float) for name, value in raw["metrics"].items()]
    values += [("reported", value, dict) for value in (raw.get("reported") or {}).values()]
    for name, figures in (raw.get("classwise") or {}).items() if isinstance(raw.get("classwise"), dict) else ():
        values += [(f"classwise.{name}", figures, dict)]
        numbers = figures.items() if isinstance(figures, dict) else ()
        values += [(f"classwise.{name}.{one}", value, int | float) for one, value in numbers if value is not None]
    wrong = [(n, v) for n, v, kind in values if isinstance(v, bool) != (kind is bool) or not isinstance(v, kind)]
    for name, value in wrong + infinite:
        raise UserError(f"{path} is broken: {name} is {value!r:.60}")
    return record_of(raw)


def record_of(raw: Mapping[str, Any]) -> Record:
    """A record from plain values by key, whose types have been checked."""
    known = {entry.name for entry in fields(Record)} - {"more", "given"}
    more = {key: value for key, value in raw.items() if key not in known}
    return Record(**{key: value for key, value in raw.items() if key in known}, more=more, given=frozenset(raw))
