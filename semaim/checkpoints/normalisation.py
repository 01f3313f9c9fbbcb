"""Mean and standard deviation that images are normalised with: an encoder's own, a config's, or ImageNet's.

An encoder needs images normalised as in its training, so the statistics in a checkpoint apply to every stage that
starts from it or measures it, unless the config sets others. They are for pixels from 0 to 1 here and in `dataset.mean`
and `dataset.std`; for 0 to 255, as in mmengine, in a detector's or segmentor's `model.data_preprocessor`.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from semaim.checkpoints import hub_config
from semaim.checkpoints.files import FORMAT
from semaim.checkpoints.safe_reading import read_file
from semaim.errors import UserError

Triple = tuple[float, float, float]

DIGITS = 8  #: kept when converting between the ranges: 123.675 / 255 is 0.485 again


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of the three channels, of pixels from 0 to 1, and their origin in words."""

    mean: Triple = IMAGENET_DEFAULT_MEAN
    std: Triple = IMAGENET_DEFAULT_STD
    origin: str = "ImageNet's"

    def __str__(self) -> str:
        """The text after "images normalised with" in a log line."""
        mean, std = (", ".join(f"{value:.6g}" for value in values) for values in (self.mean, self.std))
        return f"mean ({mean}), std ({std}), {self.origin}"

    def same(self, other: "Statistics") -> bool:
        """Whether the numbers are equal."""
        return (self.mean, self.std) == (other.mean, other.std)

    def scaled(self, scale: int) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of pixels from 0 to `scale`."""
        parts = self.mean, self.std
        mean, std = ([v if scale == 1 else round(v * scale, DIGITS) for v in values] for values in parts)
        return mean, std

    @classmethod
    def checked(cls, mean: Any, std: Any, scale: int, where: str, origin: str) -> "Statistics":
        """From untrusted numbers, for pixels from 0 to `scale`; `UserError` if they are not valid statistics."""
        least = scale / 255  # a spread below one grey level means pixels of another range
        kinds = (("mean", mean, 0, f"from 0 to {scale}"), ("std", std, least, f"above 0, for pixels from 0 to {scale}"))
        found: dict[str, Triple] = {}
        for name, values, smallest, range_ in kinds:
            listed = list(values) if isinstance(values, list | tuple) else []
            right = [isinstance(v, int | float) and not isinstance(v, bool) and smallest <= v <= scale for v in listed]
            if len(listed) != 3 or not all(right):
                raise UserError(f"{where}.{name} is {values!r}: give three numbers {range_}")
            red, green, blue = (float(v) if scale == 1 else round(v / scale, DIGITS) for v in listed)
            found[name] = red, green, blue
        return cls(**found, origin=origin)


def of_file(path: str | os.PathLike) -> Statistics | None:
    """The statistics in a checkpoint or in the config next to it; None if there are none."""
    path = Path(path)
    return of_content({} if path.suffix == ".safetensors" else read_file(path), path)


def of_content(content: Any, path: str | os.PathLike) -> Statistics | None:
    """As `of_file`, for a file already read: from its config, its `pretrained_cfg`, or the config.json."""
    path, content = Path(path), _mapping(content)
    if content.get("format") == FORMAT and (found := of_run(_mapping(content.get("config")), path)):
        return found
    beside = hub_config.find(path) or {}
    for held, origin in (
        (_mapping(content.get("pretrained_cfg")), f"from pretrained_cfg in {path.name}"),
        (_mapping(beside.get("pretrained_cfg")), f"from the config next to {path.name}"),
    ):
        if held.get("mean") is not None or held.get("std") is not None:
            return Statistics.checked(held.get("mean"), held.get("std"), 1, f"{path}: pretrained_cfg", origin)
    return None


def of_run(config: Mapping, path: str | os.PathLike = "the checkpoint") -> Statistics | None:
    """The statistics in the config of a semaim checkpoint; None in older ones, which used ImageNet's."""
    for holder, scale, name in (
        (config.get("dataset"), 1, "dataset"),
        (_mapping(config.get("model")).get("data_preprocessor"), 255, "model.data_preprocessor"),
    ):
        if (held := _mapping(holder)).get("mean") is not None:
            origin = f"from the config in {Path(path).name}"
            return Statistics.checked(held["mean"], held.get("std"), scale, f"{path}: {name}", origin)
    return None


def place_of(cfg: Config) -> tuple[Any, int, str]:
    """The part of a config that holds the statistics, its pixel range, and its name."""
    if "dataset" in cfg:
        return cfg.dataset, 1, "dataset"
    model = cfg.model.get("module") or cfg.model  # inside test-time augmentation
    if model.get("data_preprocessor") is None:
        raise UserError("the config's model has no data_preprocessor: images would not be normalised")
    return model.data_preprocessor, 255, "model.data_preprocessor"


def of_config(cfg: Config) -> Statistics | None:
    """The statistics that a config sets itself; None if it leaves them to the encoder.

    `settle` has recorded their origin in `cfg.statistics_from`. Without that key, ImageNet's statistics in a
    preprocessor do not count as set, as all of our configs have them, unless they are given on the command line.

    Raises:
        UserError: they are invalid, or only one of the two is set.
    """
    place, scale, name = place_of(cfg)
    mean, std = place.get("mean"), place.get("std")
    given = {part for part in ("mean", "std") if f"{name}.{part}" in (cfg.get("cfg_options") or {})}
    if (mean is None) != (std is None) or len(given) == 1:
        one, other = ("std", "mean") if mean is None or given == {"std"} else ("mean", "std")
        raise UserError(f"{name}.{one} is set and {name}.{other} is not: set both")
    if mean is None:
        return None
    origin = f"as {name}.mean and {name}.std say"
    found = Statistics.checked(mean, std, scale, name, origin)
    if given or cfg.get("statistics_from") is None and (scale == 1 or not found.same(Statistics())):
        return found
    origin = cfg.get("statistics_from")
    return origin and Statistics(found.mean, found.std, origin)


def choose(cfg: Config, weights: str | os.PathLike | None) -> Statistics:
    """The config's own statistics, else those of the weights it starts from, resumes or measures, else ImageNet's."""
    if found := of_config(cfg):
        return found
    found = of_file(weights) if weights else None
    return found or Statistics(origin=f"ImageNet's, as {Path(weights).name} holds none" if weights else "ImageNet's")


def settle(
    cfg: Config, weights: str | os.PathLike | None, own: Statistics | None = None, unknown: str = ""
) -> Statistics:
    """`choose`, and write the result to the config, from which models are built and which checkpoints store.

    Args:
        cfg: of the run.
        weights: see `choose`.
        own: the encoder's, where its source has told them already.
        unknown: why the encoder's are not known: an error, unless the config sets them.
    """
    place, scale, name = place_of(cfg)
    found = of_config(cfg) or own
    if found is None and unknown:
        raise UserError(f"{unknown}, or set --cfg-options {name}.mean=[...] {name}.std=[...]")
    found = found or choose(cfg, weights)
    place.mean, place.std = found.scaled(scale)
    cfg.statistics_from = found.origin
    return found


def _mapping(value: object) -> Mapping:
    return value if isinstance(value, Mapping) else {}
