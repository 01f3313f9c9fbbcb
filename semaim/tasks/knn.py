"""k nearest neighbours on the features of a frozen encoder: fast, deterministic, without training."""

import math
import re
from collections.abc import Iterable, Mapping

from mmengine.registry import LOOPS

from semaim.data.labelled import LabelledImages
from semaim.engine.evaluation import Evaluation, FeatureTask, Frozen, Measured
from semaim.engine.features import accuracies, knn_hits
from semaim.errors import UserError
from semaim.registry import TASKS, Metric

KEY = re.compile(r"knn([1-9]\d*)_top([15])")  #: keys in results.json, for any number of neighbours
USUAL = "knn20_top1"  #: the number of neighbours chosen in advance, if several were tried


@LOOPS.register_module()
class NearestNeighbours(Evaluation):
    """Weighted k-NN on the encoder's features.

    Args:
        ks: numbers of neighbours; those above the number of training images are left out.
        temperature: of the weights exp(cosine / temperature).
        memory_gb: bound of the memory for similarities, in GB of 10^9 bytes; less takes longer. Each query takes
            12 bytes a neighbour and 12 a channel besides.

    Source of the numbers: DINO, `eval_knn.py`.
    """

    def __init__(self, ks: tuple[int, ...] = (10, 20, 100, 200), temperature: float = 0.07, memory_gb: float = 0.5):
        self.ks, self.temperature, self.memory_gb = tuple(ks), temperature, memory_gb

    def check(self, train: LabelledImages, val: LabelledImages, shape: tuple[int, ...]) -> None:
        """`UserError` if no k is left."""
        if not self.ks or not all(type(k) is int and k > 0 for k in self.ks) or not self.temperature > 0:
            raise UserError(
                f"k-NN: ks {self.ks}, temperature {self.temperature:g}: give whole numbers from 1, and one above 0"
            )
        if not self.memory_gb > 0:
            raise UserError(f"k-NN: memory_gb {self.memory_gb:g}: give a number of GB above 0")
        if min(self.ks) > len(train):
            raise UserError(f"k-NN: k = {min(self.ks)} neighbours of {len(train)}: give 1 to {len(train)}")

    @property
    def chunk(self) -> int:
        """Rows compared at once: a similarity takes 6 bytes, 4 for itself and the rest to find the largest."""
        return max(1, math.isqrt(int(self.memory_gb * 1e9 / 6)))

    def run(self, data: Frozen) -> Measured:
        """Accuracies for every k up to the number of training images."""
        images = len(data.train[0])
        ks = [k for k in self.ks if k <= images]
        if len(ks) < len(self.ks):
            left = ", ".join(str(k) for k in self.ks if k not in ks)
            data.log(f"k-NN: k = {left} left out, there are {images} training images")
        found = knn_hits(*data.train, *data.val, data.classes, ks, self.temperature, self.chunk, device=data.device)
        metrics: dict[str, float] = {}
        scores = {}
        for k, hits in found.items():
            top1, top5 = accuracies(hits)
            data.log(f"k-NN, k = {k:3d}: top-1 {top1:.2f}  top-5 {top5:.2f}")
            metrics |= {f"knn{k}_top1": top1, f"knn{k}_top5": top5}
            scores[f"knn{k}_top1"] = hits[:, 0].numpy()
        best = max(ks, key=lambda k: metrics[f"knn{k}_top1"])
        data.log(f"best of these on the validation images: k = {best}, top-1 {metrics[f'knn{best}_top1']:.2f}")
        return Measured(metrics, scores)


@TASKS.register_module()
class KNN(FeatureTask):
    """Top-1 accuracy for each number of neighbours; the table has that for 20."""

    name = "knn"
    title = "k-NN"
    place = 1
    metrics = {USUAL: Metric("top-1, k = 20", "k-NN", share=True)}
    evaluation = {"type": "NearestNeighbours"}
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

    def described(self, names: Iterable[str]) -> dict[str, Metric]:
        """Top-1 and top-5 of every k, by rising k."""
        found = {name: (int(match[1]), match[2]) for name in names if (match := KEY.fullmatch(name))}
        order = sorted(found, key=lambda name: found[name])
        return {name: Metric(f"top-{found[name][1]}, k = {found[name][0]}", tabled=False, share=True) for name in order}

    def matches(self, cfg: Mapping) -> bool:
        """See `Task.matches`."""
        return (cfg.get("evaluation") or {}).get("type") == "NearestNeighbours"
