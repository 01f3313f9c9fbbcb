"""Fine-tuning: all layers of the encoder and a new linear head, on labelled images."""

from collections.abc import Mapping

from mmengine.config import Config

from semaim.engine.images import ImageTask
from semaim.prediction.predictor import Options, Predictor
from semaim.registry import TASKS, Metric


def accuracies(short: str) -> dict[str, Metric]:
    """The metrics of a classifier; `short` names the task in the report's first lines."""
    return {
        "top1": Metric("top-1", short, share=True),
        "top5": Metric("top-5", share=True),
        "loss": Metric("loss", unit="nats", higher_is_better=False, tabled=False),
    }


class ClassifierTask(ImageTask):
    """What the tasks that train a classifier share."""

    def predictor(self, cfg: Config, weights: str, options: Options) -> Predictor:
        """See `Task.predictor`."""
        from semaim.prediction.classes import ClassPredictor

        return ClassPredictor(cfg, weights, options)


@TASKS.register_module()
class Finetune(ClassifierTask):
    """Top-1 accuracy of a classifier on the mean of the patches, or on the class token."""

    name = "finetune"
    title = "fine-tuning"
    place = 6
    metrics = accuracies(title)
    configs = {
        "quick": "semaim/configs/finetune/vit_tiny_scenes_easy.py",
        "study": "semaim/configs/finetune/vit_tiny_cifar10.py",
        "paper": "semaim/configs/finetune/vit_base_100e.py",
    }
    weight = 2

    def matches(self, cfg: Mapping) -> bool:
        """See `Task.matches`."""
        return classifies(cfg) and not cfg["model"]["network"].get("probe")


def classifies(cfg: Mapping) -> bool:
    """Whether a config trains a classifier."""
    model = cfg.get("model")
    if not isinstance(model, Mapping) or model.get("type") != "Classification" or cfg.get("evaluation"):
        return False
    return isinstance(model.get("network"), Mapping)
