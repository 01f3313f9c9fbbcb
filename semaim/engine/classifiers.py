"""k-NN and the fast linear probe, fitted once on the training images' features and applied to many sets of images.

Shapes: M images of a set, D channels.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from mmengine.dist import is_main_process
from torch import Tensor

from semaim.data.labelled import LabelledImages
from semaim.engine.evaluation import Frozen
from semaim.engine.features import LRS, FittedProbe, Split, check_probe, fit_probe, heads_hits, knn_hits
from semaim.errors import UserError

PROBE = "probe"


@dataclass(frozen=True)
class Settings:
    """Of both classifiers.

    Args:
        k: neighbours of k-NN.
        temperature: of the weights exp(cosine / temperature) of neighbours.
        lrs: learning rates to try for the linear probe.
        epochs, batch: of the probe's training.
        held_out: share of the training images for choosing the learning rate.
    """

    k: int = 20
    temperature: float = 0.07
    lrs: tuple[float, ...] = LRS
    epochs: int = 50
    batch: int = 1024
    held_out: float = 0.1

    def check(self, train: LabelledImages) -> None:
        """`UserError` for settings that cannot work on these training images."""
        if type(self.k) is not int or not 1 <= self.k <= len(train) or not self.temperature > 0:
            raise UserError(
                f"k-NN: k {self.k} of {len(train)} training images, temperature {self.temperature:g}: give k from 1 to"
                f" {len(train)}, and a temperature above 0"
            )
        check_probe(self.lrs, torch.from_numpy(train.labels), self.held_out, self.epochs, self.batch)

    @property
    def names(self) -> tuple[str, str]:
        """Of the classifiers, as keys of results.json begin."""
        return PROBE, f"knn{self.k}"


@dataclass
class Classifiers:
    """Both, fitted on the training features of `data`. The probe is fitted on the main process alone."""

    data: Frozen
    settings: Settings
    probe: FittedProbe | None = field(init=False, default=None)

    def __post_init__(self):
        if is_main_process():
            own, data = self.settings, self.data
            options = asdict(own)
            del options["k"], options["temperature"]  # k-NN's
            self.probe = fit_probe(*data.train, data.classes, **options, seed=data.seed, device=data.device)
            data.log(f"fast probe: learning rate {self.probe.lr:g}")
            if self.probe.at_border:
                data.log("the best learning rate is at the border of those tried: widen evaluation.lrs")

    def hits(self, images: Split, among: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Name of a classifier -> bool (M, 2): whether each image's class comes first, and is among the first five.

        Called in every process; the probe's is missing on all but the main one. `among` are the classes that can be
        predicted, None for all.
        """
        own, data = self.settings, self.data
        probe, knn = own.names
        neighbours = knn_hits(
            *data.train, *images, data.classes, [own.k], own.temperature, device=data.device, among=among
        )
        found = {knn: neighbours[own.k]}
        if self.probe is not None:
            features, labels = (torch.from_numpy(np.array(part)).to(data.device) for part in images)
            found[probe] = heads_hits(self.probe.heads, features, labels, torch.arange(len(labels)), among)[0]
        return found
