"""Linear probing by the published recipes: a linear classifier on the frozen encoder, on augmented images."""

from collections.abc import Mapping

from semaim.registry import TASKS
from semaim.tasks.finetune import ClassifierTask, accuracies, classifies


@TASKS.register_module()
class Linear(ClassifierTask):
    """Top-1 accuracy of the probe."""

    name = "linear"
    title = "linear probing"
    place = 4
    metrics = accuracies(title)
    configs = {"paper": "semaim/configs/linear/vit_base_90e.py"}

    def matches(self, cfg: Mapping) -> bool:
        """See `Task.matches`."""
        return classifies(cfg) and bool(cfg["model"]["network"].get("probe"))
