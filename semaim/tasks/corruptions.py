"""How an encoder's features stand ImageNet-C's corruptions: k-NN and the fast probe, fitted on clean images."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from mmengine.registry import LOOPS

from semaim.data.corruptions import CORRUPTIONS, SEVERITIES, check_corruption
from semaim.data.labelled import LabelledImages, draws
from semaim.engine.classifiers import Classifiers, Settings
from semaim.engine.evaluation import Evaluation, FeatureTask, Frozen, Measured
from semaim.errors import UserError
from semaim.registry import TASKS, Metric

MEAN = "corrupted"  #: of all corruptions and severities, in the names of metrics


@LOOPS.register_module()
class Corruptions(Evaluation):
    """Top-1 accuracy on the validation images, corrupted; each corruption at each severity is a pass over them.

    Args:
        names: one or more of `semaim.data.corruptions.CORRUPTIONS`; None for all 15.
        severities: one or more of 1 to 5.
        **settings: of the classifiers, see `semaim.engine.classifiers.Settings`.
    """

    def __init__(
        self,
        names: str | Sequence[str] | None = None,
        severities: int | Sequence[int] = SEVERITIES,
        **settings: Any,
    ):
        names = [names] if isinstance(names, str) else names
        severities = [severities] if isinstance(severities, int) else severities
        self.names = tuple(dict.fromkeys(CORRUPTIONS if names is None else names))
        self.severities = tuple(dict.fromkeys(severities))
        self.settings = Settings(**settings)

    def check(self, train: LabelledImages, val: LabelledImages, shape: tuple[int, ...]) -> None:
        """`UserError` for an unknown corruption or severity, a missing library, and settings that cannot work."""
        if not self.names or not self.severities:
            raise UserError("corruptions: evaluation.names and evaluation.severities need one entry or more")
        for name in self.names:
            for severity in self.severities:
                check_corruption(name, severity)
        if draws(val.transform):
            raise UserError("corruptions: dataset.corruption is set, so no image is clean: leave it out")
        self.settings.check(train)
        self.sets(val)

    def sets(self, val: LabelledImages) -> dict[str, LabelledImages]:
        """The validation images, corrupted: by NAME_SEVERITY."""
        return {f"{name}_{level}": val.corrupted(name, level) for name in self.names for level in self.severities}

    def run(self, data: Frozen) -> Measured:
        """Accuracies on the clean images, of every corruption and of every severity; their mean is the figure."""
        classifiers = Classifiers(data, self.settings)
        clean = classifiers.hits(data.val)
        cells = {
            (name, level): classifiers.hits(data.more[f"{name}_{level}"])
            for name in self.names
            for level in self.severities
        }
        metrics: dict[str, float] = {}
        scores: dict[str, np.ndarray] = {}
        for kind in clean:
            right = {cell: hits[kind][:, 0].double().numpy() for cell, hits in cells.items()}
            scores[f"{MEAN}_{kind}_top1"] = np.mean(list(right.values()), axis=0)
            metrics[f"{MEAN}_{kind}_top1"] = 100 * float(scores[f"{MEAN}_{kind}_top1"].mean())
            metrics[f"clean_{kind}_top1"] = 100 * clean[kind][:, 0].double().mean().item()
            for name in self.names:
                of_name = [100 * right[name, level].mean() for level in self.severities]
                metrics[f"{name}_{kind}_top1"] = float(np.mean(of_name))
                data.log(f"{name}, {kind}: " + "  ".join(f"{value:.2f}" for value in of_name))
            for level in self.severities:
                metrics[f"severity{level}_{kind}_top1"] = 100 * float(
                    np.mean([right[name, level].mean() for name in self.names])
                )
            data.log(
                f"{kind}: top-1 {metrics[f'clean_{kind}_top1']:.2f} clean, {metrics[f'{MEAN}_{kind}_top1']:.2f} mean of"
                f" {len(self.names)} corruptions at severities {', '.join(map(str, self.severities))}"
            )
        return Measured(metrics, scores)


setattr(Corruptions.__init__, "arguments_of", Settings)  # noqa: B010  # for the check of config keys


@TASKS.register_module()
class CorruptionsTask(FeatureTask):
    """Mean top-1 accuracy over corruptions and severities.

    There is no mCE: it is relative to AlexNet's errors on the published files, and the images here are others.
    """

    name = "corruptions"
    title = "corrupted images"
    place = 3
    metrics = {
        f"{MEAN}_probe_top1": Metric("probe, mean top-1", "corrupted images"),
        f"{MEAN}_knn20_top1": Metric("k-NN, mean top-1"),
    }
    evaluation = {"type": "Corruptions"}

    def reported(self, names: Iterable[str]) -> dict[str, Metric]:
        """The means, for any number of neighbours."""
        found = {}
        for name in names:
            kind = name.removeprefix(f"{MEAN}_").removesuffix("_top1")
            if name == f"{MEAN}_{kind}_top1":
                label = f"k-NN, k = {kind[3:]}" if kind.startswith("knn") else kind
                found[name] = self.metrics.get(name, Metric(f"{label}, mean top-1"))
        return found
