"""What a run measured, and what its figures depend on: `results.json`, written by the engine, read by all else."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from semaim.errors import UserError

FILE = "results.json"  #: in a run's work folder


@dataclass(frozen=True)
class Record:
    """One results.json. None: not recorded, or none; `given` distinguishes the two.

    Args:
        metrics: figure by its key; which the table has, and their units, is the task's to say.
        config: file name of the config, its folder before it where it is none of the suite's.
        method: of the pretraining, as published.yaml spells it; None for random weights, and for unknown ones.
        backbone: such as ViT-B.
        task: title of the task.
        reported: the task's metrics as `semaim.registry.Metric` has them, for a reader that does not know the task.
        checkpoint: whose weights were measured or started from; None for random ones.
        pretrain_config, pretrain_epochs, pretrain_images, pretrain_options: how those weights were made.
        partly_loaded: in words, what of an encoder was left out when it was loaded.
        load_report: numbers of tensors that were loaded, by kind.
        data: folder of the images.
        train_images, val_images: how many were trained (or searched) and evaluated on.
        mean, std, statistics_from: of the images, from 0 to 1, and whose they are.
        seed: of the run.
        cfg_options: what was changed of the config. overrides: what --override changed of a resumed run.
        epochs, iterations: length of the training.
        stage: what was done, of a test. features: which of an encoder were measured.
        scales: of the image, that a prediction is the mean over, each also flipped.
        classes_evaluated, classes: over how many of how many classes a mean is.
        left_out: what keep_classes leaves out of the annotations.
        commit, device, semaim, torch, date: code, machine and time.
        more: anything else that the file holds.
        given: the keys that the file holds.
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
    stage: str | None = None
    features: str | None = None
    scales: list[float] | None = None
    classes_evaluated: float | None = None
    classes: float | None = None
    left_out: dict | None = None
    commit: str | None = None
    device: str | None = None
    semaim: str | None = None
    torch: str | None = None
    date: str | None = None
    more: dict[str, Any] = field(default_factory=dict)
    given: frozenset[str] = frozenset()

    def values(self) -> dict[str, Any]:
        """What the file holds besides the metrics, by key."""
        held = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name in self.given}
        return {key: value for key, value in (held | self.more).items() if key != "metrics"}

    def write(self, folder: Path) -> None:
        """Write it into a folder, whole or not at all; what is None is left out unless it is in `given`."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values = {key: value for key, value in values.items() if value is not None or key in self.given}
        values |= values.pop("more")
        del values["given"]
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / ".results.partial"
        partial.write_text(json.dumps(values, indent=2, default=str) + "\n")
        os.replace(partial, folder / FILE)


def _kind(annotation: Any) -> type | UnionType:
    """What a value may be: `float | None` -> a number, `dict[str, Any] | None` -> a dict."""
    (held,) = [part for part in get_args(annotation) if part is not NoneType]
    kind = get_origin(held) or held
    return int | float if kind is float else kind


def read_record(path: Path) -> Record:
    """The record in a results.json; `UserError` where it is none."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # of JSON or of its encoding
        raise UserError(f"{path} is broken: {error}") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("metrics"), dict):
        raise UserError(f"{path} is none of our results: it has no metrics")
    kinds = {entry.name: _kind(entry.type) for entry in fields(Record) if entry.default is None}
    values = [(name, value, kinds[name]) for name, value in raw.items() if name in kinds]
    values = [(name, value, kind) for name, value, kind in values if value is not None]
    values += [(f"metrics.{name}", value, int | float) for name, value in raw["metrics"].items()]
    for name in ("scales", "mean", "std"):
        if raw.get(name) is not None:
            numbers = raw[name] if isinstance(raw[name], list) and raw[name] else [None]
            values += [(name, value, int | float) for value in numbers]
    for name, value, kind in values:
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind):
            raise UserError(f"{path} is broken: {name} is {value!r}")
    return record_of(raw)


def record_of(raw: Mapping[str, Any]) -> Record:
    """A record of plain values by key, whose kinds are right."""
    known = {entry.name for entry in fields(Record)} - {"more", "given"}
    more = {key: value for key, value in raw.items() if key not in known}
    return Record(**{key: value for key, value in raw.items() if key in known}, more=more, given=frozenset(raw))
