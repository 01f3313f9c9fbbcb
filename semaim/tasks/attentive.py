"""Attentive probing by the published protocol: learned queries on the frozen encoder's tokens, on augmented images."""

from semaim.registry import TASKS
from semaim.tasks.finetune import ClassifierTask, accuracies


@TASKS.register_module()
class Attentive(ClassifierTask):
    """Top-1 accuracy of the probe."""

    name = "attentive"
    title = "attentive probing"
    place = 5
    metrics = accuracies(title)
    configs = {"paper": "semaim/configs/attentive/vit_base_90e.py"}
