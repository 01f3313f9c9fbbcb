"""k nearest neighbours on the features of a frozen encoder: fast, deterministic, without training."""

import re
from collections.abc import Iterable, Mapping

import torch
from mmengine.registry import LOOPS

from semaim.engine.evaluation import FeatureTask
from semaim.engine.features import Split, knn_accuracy
from semaim.registry import TASKS, Metric

KEY = re.compile(r"knn([1-9]\d*)_top([15])")  #: keys in results.json, for any number of neighbours
USUAL = "knn20_top1"  #: the number of neighbours chosen in advance, if several were tried


@LOOPS.register_module()
class NearestNeighbours:
    """Weighted k-NN on the encoder's features.

    Args:
        ks: numbers of neighbours; those above the number of training images are left out.
        temperature: of the weights exp(cosine / temperature).

    Source of the numbers: DINO, `eval_knn.py`.
    """

    def __init__(self, ks: tuple[int, ...] = (10, 20, 100, 200), temperature: float = 0.07):
        self.ks, self.temperature = tuple(ks), temperature

    def run(self, train: Split, val: Split, classes: int, device: torch.device, log) -> dict[str, float]:
        """(features, labels) of both splits -> metrics; `UserError` if no k is left."""
        images = len(train[0])
        # If none is left, the smallest is used and causes the error.
        ks = [k for k in self.ks if k <= images] or [min(self.ks)]
        if len(ks) < len(self.ks):
            left = ", ".join(str(k) for k in self.ks if k not in ks)
            log(f"k-NN: k = {left} left out, there are {images} training images")
        found = knn_accuracy(*train, *val, classes, ks=ks, temperature=self.temperature, device=device)
        for k, (top1, top5) in found.items():
            log(f"k-NN, k = {k:3d}: top-1 {top1:.2f}  top-5 {top5:.2f}")
        metrics = {
            f"knn{k}_top{n}": value for k, values in found.items() for n, value in zip((1, 5), values, strict=True)
        }
        best = max(found, key=lambda k: found[k][0])
        log(f"best of these on the validation images: k = {best}, top-1 {found[best][0]:.2f}")
        return metrics


@TASKS.register_module()
class KNN(FeatureTask):
    """Top-1 accuracy for each number of neighbours; the table has that for 20."""

    name = "knn"
    title = "k-NN"
    place = 1
    metrics = {USUAL: Metric("top-1, k = 20", "k-NN", share=True)}
    configs = {
        "quick": "semaim/configs/knn/vit_tiny_scenes_easy.py",
        "study": "semaim/configs/knn/vit_tiny_cifar10.py",
        "paper": "semaim/configs/knn/vit_base.py",
    }

    def reported(self, names: Iterable[str]) -> dict[str, Metric]:
        """The usual k, or if it is missing all, by rising k."""
        found = {name: int(match[1]) for name in names if (match := KEY.fullmatch(name)) and match[2] == "1"}
        kept = [USUAL] if USUAL in found else sorted(found, key=lambda name: found[name])
        return {name: Metric(f"top-1, k = {found[name]}", "k-NN", share=True) for name in kept}

    def matches(self, cfg: Mapping) -> bool:
        """See `Task.matches`."""
        return (cfg.get("evaluation") or {}).get("type") == "NearestNeighbours"
