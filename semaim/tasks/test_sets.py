"""k-NN and the fast probe on further test sets of the same classes, such as ImageNet-V2, -A, -R and -Sketch."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.registry import LOOPS

from semaim.data.labelled import LabelledImages
from semaim.data.test_sets import describe_test_set, open_test_sets, predicted_among
from semaim.engine.classifiers import Classifiers, Settings
from semaim.engine.evaluation import Evaluation, FeatureTask, Frozen, Measured
from semaim.engine.features import accuracies
from semaim.errors import UserError
from semaim.registry import TASKS, Metric

KEY = re.compile(r"test_(.+)_(probe|knn[1-9]\d*)_top1")  #: keys in results.json, for any name


@LOOPS.register_module()
class FurtherSets(Evaluation):
    """Top-1 and top-5 accuracy on further test sets, of classifiers fitted on the training images.

    Where a set lacks some of the classes, only those it has are predicted.

    Args:
        roots: name -> folder, see `semaim.data.test_sets.open_test_set`.
        **settings: of the classifiers, see `semaim.engine.classifiers.Settings`.
    """

    def __init__(self, roots: Mapping[str, str] | None = None, **settings: Any):
        self.roots = dict(roots or {})
        self.settings = Settings(**settings)
        self.opened: dict[str, LabelledImages] = {}

    def check(self, train: LabelledImages, val: LabelledImages, shape: tuple[int, ...]) -> None:
        """`UserError` for a set whose folders are no classes, and settings that cannot work."""
        if not self.roots:
            raise UserError("test_sets: name one or more, --test-root NAME=DIR")
        self.settings.check(train)
        self.sets(val)

    def sets(self, val: LabelledImages) -> dict[str, LabelledImages]:
        """The images of every set, as test_NAME."""
        self.opened = self.opened or open_test_sets(val, self.roots)
        return {f"test_{name}": images for name, images in self.opened.items()}

    def run(self, data: Frozen) -> Measured:
        """Accuracies, and the number of images and classes, of every set."""
        classifiers = Classifiers(data, self.settings)
        metrics: dict[str, float] = {}
        for name, images in self.opened.items():
            data.log(describe_test_set(name, images))
            found = data.more[f"test_{name}"]
            among = predicted_among(np.array(found[1]), data.classes)
            for kind, hits in classifiers.hits(found, among).items():
                top1, top5 = accuracies(hits)
                data.log(f"{name}, {kind}: top-1 {top1:.2f}  top-5 {top5:.2f}")
                metrics |= {f"test_{name}_{kind}_top1": top1, f"test_{name}_{kind}_top5": top5}
            metrics |= {f"test_{name}_images": len(images), f"test_{name}_classes": len(among or range(data.classes))}
        return Measured(metrics)


setattr(FurtherSets.__init__, "arguments_of", Settings)  # noqa: B010  # for the check of config keys


@TASKS.register_module()
class TestSetsTask(FeatureTask):
    """Top-1 accuracy on every further test set."""

    name = "test_sets"
    title = "further test sets"
    place = 3
    evaluation = {"type": "FurtherSets"}

    def adjusted(self, cfg: Config, settings: dict[str, Any]) -> dict[str, Any]:
        """With the config's `test_roots`."""
        roots = {**(settings.get("roots") or {}), **(cfg.get("test_roots") or {})}
        return settings | {"roots": roots}

    def reported(self, names: Iterable[str]) -> dict[str, Metric]:
        """Top-1 of every set."""
        found = {name: match for name in names if (match := KEY.fullmatch(name))}
        words = {name: match[2].replace("knn", "k-NN, k = ") for name, match in found.items()}
        return {name: Metric(f"{match[1]}, {words[name]}") for name, match in found.items()}
