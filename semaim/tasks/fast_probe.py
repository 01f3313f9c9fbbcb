"""A linear probe that takes a minute, on features extracted once, without augmentation."""

from collections.abc import Mapping
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.registry import LOOPS

from semaim.data.labelled import LabelledImages
from semaim.engine.evaluation import Evaluation, FeatureTask, Frozen, Measured, measured_probe
from semaim.engine.features import LRS, check_probe, fast_probe
from semaim.registry import TASKS, Metric


@LOOPS.register_module()
class FastProbe(Evaluation):
    """A linear classifier on features extracted once, without augmentation, at many learning rates in parallel.

    The learning rate is chosen on a held-out part of the training images. Not comparable with published linear probes,
    which use augmentation.

    Args:
        lrs: learning rates to try; None for the default range.
        epochs, batch: of the probe's training.
        held_out: share of the training images for choosing the learning rate.
    """

    def __init__(
        self, lrs: tuple[float, ...] | None = None, epochs: int = 50, batch: int = 1024, held_out: float = 0.1
    ):
        self.options: dict[str, Any] = {"epochs": epochs, "batch": batch, "held_out": held_out}
        self.options |= {"lrs": tuple(lrs)} if lrs else {}

    def check(self, train: LabelledImages, val: LabelledImages, shape: tuple[int, ...]) -> None:
        """`UserError` for learning rates, a held-out share or a length that cannot work."""
        check_probe(labels=torch.from_numpy(train.labels), **{"lrs": LRS, **self.options})

    def run(self, data: Frozen) -> Measured:
        """The accuracy on the main process; nothing on the others."""
        if not is_main_process():
            return Measured({})
        options = {**self.options, "seed": data.seed, "device": data.device}
        found = fast_probe(*data.train, *data.val, data.classes, **options)
        return measured_probe(found, "fast probe", "probe", data.log)


@TASKS.register_module()
class FastProbeTask(FeatureTask):
    """Top-1 accuracy at the learning rate that is best on held-out training images."""

    name = "fast_probe"
    title = "fast linear probe"
    stage = "linear"
    place = 2
    metrics = {
        "probe_top1": Metric("top-1", "fast probe", share=True),
        "probe_top5": Metric("top-5", tabled=False, share=True),
    }
    evaluation = {"type": "FastProbe"}
    configs = {
        "quick": "semaim/configs/linear/vit_tiny_scenes_easy_fast.py",
        "study": "semaim/configs/linear/vit_tiny_cifar10_fast.py",
    }

    def matches(self, cfg: Mapping) -> bool:
        """See `Task.matches`."""
        return (cfg.get("evaluation") or {}).get("type") == "FastProbe"
