"""An attentive probe on tokens extracted once, without augmentation."""

from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.registry import LOOPS

from semaim.data.labelled import LabelledImages
from semaim.engine.attentive import LRS, fast_attentive, make_heads
from semaim.engine.evaluation import TOKENS, Evaluation, FeatureTask, Frozen, Measured, measured_probe
from semaim.engine.features import check_probe
from semaim.errors import UserError
from semaim.registry import TASKS, Metric


@LOOPS.register_module()
class FastAttentive(Evaluation):
    """Learned queries attend to tokens extracted once, without augmentation; a linear layer reads what they gather.

    The learning rate is chosen on a held-out part of the training images. Not comparable with published attentive
    probes, which use augmentation.

    Args:
        pool: a name of `semaim.models.attentive.ATTENTIVE`: efficient probing (ep) or AIM's pooling (aim), of the
            patches or with the class token (ep_all, aim_all).
        lrs: learning rates to try; None for the default range.
        epochs, batch: of the probe's training.
        held_out: share of the training images for choosing the learning rate.
        queries: learned queries that attend to the tokens; None for 32 of efficient probing, 1 of AIM.
        d_out: the pooled vector has 1 / d_out of the channels, with efficient probing.
        heads: of AIM's attention.
    """

    reads = TOKENS

    def __init__(
        self,
        pool: str = "ep",
        lrs: tuple[float, ...] | None = None,
        epochs: int = 30,
        batch: int = 256,
        held_out: float = 0.1,
        queries: int | None = None,
        d_out: int = 1,
        heads: int = 12,
    ):
        self.head: dict[str, Any] = {"queries": queries, "d_out": d_out, "heads": heads}
        self.options: dict[str, Any] = {"pool": pool, "lrs": tuple(lrs or LRS), "epochs": epochs, "batch": batch}
        self.options["held_out"] = held_out

    def check(self, train: LabelledImages, val: LabelledImages, shape: tuple[int, ...]) -> None:
        """`UserError` for options that do not fit the tokens, learning rates and a held-out share that cannot work."""
        probe = dict(self.options)
        pool = probe.pop("pool")
        make_heads(1, pool, shape[-1], len(train.classes), 0, self.head)
        check_probe(labels=torch.from_numpy(train.labels), **probe)
        if probe["batch"] == 1 and pool.startswith("ep"):
            raise UserError("fast attentive probe: one image cannot be normalised: set batch to 2 or more")

    def run(self, data: Frozen) -> Measured:
        """The accuracy on the main process; nothing on the others."""
        if not is_main_process():
            return Measured({})
        options = {**self.options, "head": self.head, "prefix": data.prefix, "seed": data.seed, "device": data.device}
        found = fast_attentive(*data.train, *data.val, data.classes, **options)
        return measured_probe(found, "attentive probe", "attentive", data.log)


@TASKS.register_module()
class FastAttentiveTask(FeatureTask):
    """Top-1 accuracy at the learning rate that is best on held-out training images."""

    name = "fast_attentive"
    title = "fast attentive probe"
    stage = "attentive"
    place = 3
    metrics = {
        "attentive_top1": Metric("top-1", "fast attentive", share=True),
        "attentive_top5": Metric("top-5", tabled=False, share=True),
    }
    evaluation = {"type": "FastAttentive"}
    uncached = (
        ", or train the probe on images, without stored tokens: tools/train.py semaim/configs/attentive/vit_base_90e.py"
        " (or plain_vit_90e.py) --pretrained SOURCE"
    )
    configs = {"study": "semaim/configs/attentive/vit_tiny_cifar10_fast.py"}
