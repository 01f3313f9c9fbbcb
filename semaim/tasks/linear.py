"""Linear probing by the published recipes: a linear classifier on the frozen encoder, on augmented images."""

from collections.abc import Mapping

from semaim.engine.images import ImageTask
from semaim.registry import TASKS, Metric
from semaim.tasks.finetune import classifies


@TASKS.register_module()
class Linear(ImageTask):
    """Top-1 of the probe."""

    name = "linear"
    title = "linear probing"
    place = 3
    metrics = {
        "top1": Metric("top-1", "linear probing"),
        "top5": Metric("top-5"),
        "loss": Metric("loss", unit="nats", higher_is_better=False, tabled=False),
    }
    chart = "accuracy, %"
    configs = {"paper": "semaim/configs/linear/vit_base_90e.py"}

    def matches(self, cfg: Mapping) -> bool:
        """See `Task.matches`."""
        return classifies(cfg) and bool(cfg["model"]["network"].get("probe"))
