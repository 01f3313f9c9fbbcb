"""What k-NN and probes, fine-tuning, detection and segmentation each load from a checkpoint's encoder."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from semaim.checkpoints import loading
from semaim.checkpoints.loading import LoadReport
from semaim.checkpoints.reading import Checkpoint, read
from semaim.errors import UserError
from semaim.models.classifier import Classifier
from semaim.models.segvit import SegmentationViT
from semaim.models.vitdet import ViTDet

#: Parts of a classifier that no pretrained encoder has, or that pooling does not read.
NEW_IN_CLASSIFIERS = ("head", "fc_norm")
#: Names of a classifier's last linear layer: alone, of a linear probe and AIM's, of efficient probing.
LINEAR = ("head.weight", "head.1.weight", "head.2.weight")
#: Parts of backbones that no pretrained encoder has.
NEW_IN_BACKBONES = ("rel_pos_h", "rel_pos_w", "rel_bias", "gamma_1", "gamma_2")
#: Scope -> what its models are, and their heads: a file with heads of the other task is not a pretrained encoder.
HEADS = {
    "mmdet": ("detector", ("rpn_head", "roi_head", "bbox_head", "mask_head")),
    "mmseg": ("segmentor", ("decode_head", "auxiliary_head")),
}


def buildable(sizes: dict) -> dict:
    """`Checkpoint.sizes`, completed so that a network can be built from any file."""
    sizes = {**sizes, "img_size": sizes["img_size"] or tuple(14 * side for side in sizes["patch_size"])}
    if sizes["embed_dim"] % sizes["num_heads"]:  # an impossible guess: no tensor shows the number of heads
        sizes["num_heads"] = 1
    return sizes


class Consumer(NamedTuple):
    """A use of an encoder: its name, its network built from `Checkpoint.sizes`, and its new parameters."""

    name: str
    network: Callable[..., nn.Module]
    new: tuple[str, ...]
    scope: str | None = None  #: mmdet or mmseg, for detection and segmentation
    left: str = ""  #: what it does not read of a plain ViT

    def fit(self, found: Checkpoint, network: nn.Module, partial: bool = False) -> tuple[LoadReport, dict]:
        """As `loading.fit`; also `UserError` for a detector or segmentor of another task."""
        if self.scope and not partial:
            check_task(found, self.scope)
        return loading.fit(network, found, self.new, partial)

    def build(self, sizes: dict) -> nn.Module:
        """Its network on the meta device, which takes no memory."""
        try:
            with torch.device("meta"):
                return self.network(**buildable(sizes))
        except ValueError as error:
            raise UserError(f"no encoder of ours has these sizes: {error}") from None


def _classifier(num_classes: int, pool: str, probe: bool = False) -> Callable[..., nn.Module]:
    return lambda **sizes: Classifier(num_classes, pool, probe, **sizes)


CONSUMERS = (
    Consumer("k-NN, probes", _classifier(0, "cls", probe=True), NEW_IN_CLASSIFIERS),
    Consumer("with pool=avg", _classifier(0, "avg", probe=True), NEW_IN_CLASSIFIERS, left="not the final norm"),
    Consumer("fine-tuning", _classifier(1, "avg"), NEW_IN_CLASSIFIERS, left="not the final norm"),
    Consumer(
        "detection",
        lambda **sizes: ViTDet(pretrain_img_size=sizes["img_size"], **sizes),
        NEW_IN_BACKBONES,
        "mmdet",
        "not the class token, its position, the final norm",
    ),
    Consumer(
        "segmentation",
        lambda **sizes: SegmentationViT(layer_scale=1.0, **sizes),
        NEW_IN_BACKBONES,
        "mmseg",
        "not the final norm",
    ),
)


def check_task(found: Checkpoint, scope: str) -> None:
    """`UserError` for a trained detector or segmentor of a task other than that of `scope`."""
    for other, (kind, heads) in HEADS.items():
        if other != scope and any(name.startswith(heads) for name in (*found.state, *found.skipped)):
            raise UserError(
                f"{found.path} is a trained {kind}, whose encoder computes with more than this one has: start from"
                " the pretrained checkpoint it was made of"
            )


def load_backbone(backbone: nn.Module, path: str | Checkpoint, scope: str, partial: bool = False) -> LoadReport:
    """Load the pretrained encoder of a file, or of a `Checkpoint`, into a detector's or segmentor's backbone."""
    found = path if isinstance(path, Checkpoint) else read(path)
    if not partial:
        check_task(found, scope)
    return loading.load(backbone, found, NEW_IN_BACKBONES, partial)


def verdicts(found: Checkpoint) -> Iterator[tuple[str, str]]:
    """What each consumer would load from a checkpoint, or why it would refuse it."""
    for consumer in CONSUMERS:
        try:
            report, _ = consumer.fit(found, consumer.build(found.sizes))
        except UserError as error:
            yield consumer.name, f"refused: {error}"
        else:
            left = f"; {consumer.left}" if consumer.left else ""
            yield consumer.name, f"{len(report.matched)} tensors{left}"
