"""Costs of stages: GPU-hours = images / rate, if a rate was given or measured, and disk space for checkpoints."""

import logging
import math
import re
import statistics
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from semaim.errors import UserError, nearest
from semaim.places import own_config
from semaim.registry import task_for, variants
from semaim.results.logs import read_scalars
from semaim.results.running import read
from semaim.results.stages import Stage, stage_names

MOMENTS = {"AdamW": 2, "Adam": 2, "SGD": 1, "LARS": 1}  #: numbers that an optimizer keeps per trained weight
CLASSES = 1000  #: ImageNet's, if the data determines the number; fewer give a slightly smaller file


@dataclass(frozen=True)
class Cost:
    """The cost of one stage.

    Args:
        images: number that passes through the network in training or measuring; None if not known.
        counted: how that number is calculated, in words.
        rate: images per second and GPU; None if not known.
        source: origin of the rate.
        disk: bytes of checkpoints or of stored features.
        kept: how that number is calculated, in words.
    """

    stage: Stage
    images: int | None
    counted: str
    rate: float | None
    source: str
    disk: int
    kept: str

    @property
    def gpu_hours(self) -> float | None:
        """None if images or rate are not known."""
        return None if self.images is None or self.rate is None else self.images / self.rate / 3600

    def __str__(self) -> str:
        processes, hours = self.stage.gpus * self.stage.nodes, self.gpu_hours
        if self.images is None:
            time = self.counted
        elif self.rate is None or hours is None:
            time = f"{self.counted}; rate unknown: give --rate {self.stage.name}=N"
        else:
            time = f"{self.counted}; / {self.rate:g} images/s ({self.source}) / 3600 = {hours:,.2f} GPU-hours"
            time += f", {hours / processes:,.2f} h on {processes} GPUs" if processes > 1 else ""
        return f"{time}; {self.kept}"


def parse_rates(words: Iterable[str]) -> dict[str, float]:
    """STAGE=N and METHOD/STAGE=N -> numbers by left-hand side; `UserError` for anything else."""
    rates = {}
    for word in words:
        match = re.fullmatch(r"(?:([\w-]+)/)?(\w+)=([0-9.eE+]+)", word)
        if not match:
            raise UserError(f"--rate {word}: write STAGE=N or METHOD/STAGE=N, images per second and GPU")
        method, name, number = match.groups()
        for part, known in ((method, variants()), (name, stage_names())):
            if part and part not in known:
                raise UserError(f"--rate {word}: no {part}: {nearest(part, known)}")
        try:
            rate = float(number)
        except ValueError:
            rate = 0.0
        if not 0 < rate < math.inf:
            raise UserError(f"--rate {word}: give a number above 0")
        rates[f"{method}/{name}" if method else name] = rate
    return rates


def cost_of(stage: Stage, rates: Mapping[str, float]) -> Cost:
    """The cost of a stage, at the given rate, else at the rate that an earlier run in its folder logged."""
    from semaim.engine.config import load_config  # takes a second

    cfg = load_config(own_config(stage.config), stage.options, check=False)
    given = rates.get(f"{stage.method}/{stage.name}", rates.get(stage.name))
    rate, source = (given, "--rate") if given else measured_rate(stage)
    batch, length = stage.batch or 0, stage.length or 0  # set if a stage trains
    images: int | None
    if stage.unit == "iterations":
        images = batch * length
        counted = f"{batch:,} images x {length:,} steps = {images:,} images"
    elif stage.images is None:
        images, counted = None, "images not counted: name the data"
    elif stage.unit == "epochs":
        images = stage.images * length
        counted = f"{stage.images:,} images x {length:,} epochs = {images:,} images"
    else:
        images, counted = stage.images, f"{stage.images:,} images once"
    if not stage.trains:
        disk = (stage.images or 0) * sizes_of(stage.config)[2] * 2  # half precision
        return Cost(stage, images, counted, rate, source, disk, f"features: {in_bytes(disk)}")
    one = checkpoint_bytes(cfg, stage.config)
    files = checkpoints_kept(cfg, length)
    kept = f"checkpoints: {files} x {in_bytes(one)} = {in_bytes(files * one)}"
    return Cost(stage, images, counted, rate, source, files * one, kept)


def measured_rate(stage: Stage) -> tuple[float | None, str]:
    """Median of the images per second and GPU that the stage's own run logged; None if there is no log."""
    try:
        lines = read_scalars(stage.folder)
        processes = read(stage.folder / "stage.json").get("processes")
    except UserError:
        return None, ""
    rates = (line.get("images_per_second") for line in lines)
    logged = [rate for rate in rates if isinstance(rate, int | float) and 0 < rate < math.inf]
    if not logged or not isinstance(processes, int) or processes < 1:
        return None, ""
    return statistics.median(logged) / processes, f"median logged in {stage.folder}"


@contextmanager
def silence() -> Iterator[None]:
    """Context without the output of mmdet, mmseg and mmengine while they build a model."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


@cache
def sizes_of(config: str) -> tuple[int, int, int]:
    """Of a config's model, built on the meta device: bytes of all weights, number of trained ones, encoder width."""
    from semaim.engine.config import load_config

    cfg = load_config(own_config(config), check=False)
    with silence(), torch.device("meta"):
        task_for(cfg).enter(cfg)
        if cfg.model.get("network", {}).get("num_classes", 0) is None:
            cfg.model.network.num_classes = CLASSES
        model = MODELS.build({**cfg.model, "_scope_": cfg.default_scope})
        encoder = getattr(model, "network", None) or model.backbone
    weights = sum(tensor.numel() * tensor.element_size() for tensor in checkpointed(model).values())
    return weights, sum(p.numel() for p in model.parameters() if p.requires_grad), encoder.embed_dim


def checkpointed(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a model that a checkpoint contains."""
    return getattr(model, "network", model).state_dict()


def checkpoint_bytes(cfg: Config, config: str) -> int:
    """Bytes of a checkpoint: all weights, and the optimizer's state for the trained ones."""
    weights, trained, _ = sizes_of(config)
    return weights + 4 * MOMENTS[cfg.optim_wrapper.optimizer.type] * trained


def checkpoints_kept(cfg: Config, length: int) -> int:
    """Number of checkpoints that a run of `length` epochs or iterations leaves."""
    hook = cfg.default_hooks.checkpoint
    saved = math.ceil(length / hook.get("interval", 20))
    return min(saved, hook.get("keep", 3) or saved)


def in_bytes(count: int) -> str:
    """Bytes in GB, or in MB if small."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def totals(costs: Iterable[Cost]) -> str:
    """The sums; unknown parts are named."""
    costs = list(costs)
    known = [cost.gpu_hours for cost in costs if cost.gpu_hours is not None]
    unknown = [cost for cost in costs if cost.gpu_hours is None]
    hours = f"{sum(known):,.2f} GPU-hours" if known else "GPU-hours unknown"
    without = ", ".join(dict.fromkeys(cost.stage.name for cost in unknown))
    time = f"{hours} without {without}, of unknown rate" if known and unknown else hours
    return f"total: {time}; {in_bytes(sum(cost.disk for cost in costs))} of disk; validation is not counted"
