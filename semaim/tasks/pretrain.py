"""Pretraining without labels, by any method of `semaim.methods`."""

from collections.abc import Mapping

from mmengine.config import Config

from semaim.engine.images import ImageTask
from semaim.registry import TASKS


@TASKS.register_module()
class Pretrain(ImageTask):
    """The model is a `Pretraining` of a method's network; there is no validation."""

    name = "pretrain"
    title = "pretraining"
    place = 0
    labelled = False
    pretrains = True
    published = False
    weight = 5

    def model_config(self, cfg: Config) -> dict:
        """The model's config, with the statistics that it normalises pixels with."""
        statistics = {"mean": cfg.dataset.get("mean"), "std": cfg.dataset.get("std")}
        return {**super().model_config(cfg), **statistics}

    def matches(self, cfg: Mapping) -> bool:
        """See `Task.matches`."""
        model = cfg.get("model")
        return isinstance(model, Mapping) and model.get("type") == "Pretraining"
