"""How far an encoder's features go with few labels: logistic regression and k-NN on k images per class, or on lists."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.registry import LOOPS
from torch import Tensor

from semaim.data.few import check_every_class, draw_ranks, read_list, share_of_each
from semaim.data.labelled import LabelledImages
from semaim.engine.evaluation import Evaluation, FeatureTask, Frozen, Measured
from semaim.engine.features import knn_hits, rank_of
from semaim.engine.logistic import fit_logistic, unit
from semaim.errors import UserError
from semaim.registry import TASKS, Metric

KEY = re.compile(r"few_(shots|percent|list)_?([^_].*?)_(probe|knn)_top1")  #: keys in results.json
TABLED = ("1", "4", "16")  #: images per class in the table


@LOOPS.register_module()
class FewLabels(Evaluation):
    """Top-1 accuracy with few labels: the mean over several draws, and their standard deviation.

    Images are drawn for each class by (seed, draw), more of them containing the fewer. The probe is logistic regression
    with a fixed penalty, as there are no images to choose one on. k-NN has as many neighbours as a class has images, at
    most 20.

    Args:
        shots: images per class; those that a class does not have are left out.
        shares: shares of the training images of each class, such as 0.01.
        draws: how many, of every number of images.
        lists: text files of image names, measured as given, without draws; see `semaim.data.few.read_list`.
        penalty: of the weights, see `fit_logistic`.
        temperature: of k-NN.
    """

    def __init__(
        self,
        shots: Sequence[int] = (1, 2, 4, 8, 16),
        shares: Sequence[float] = (),
        draws: int = 5,
        lists: Sequence[str] = (),
        penalty: float = 0.00025,
        temperature: float = 0.07,
    ):
        self.shots, self.shares, self.draws = tuple(sorted(set(shots))), tuple(sorted(set(shares))), draws
        self.penalty, self.temperature = penalty, temperature
        self.files = [lists] if isinstance(lists, str) else list(lists)
        self.lists: dict[str, Tensor] = {}

    def check(self, train: LabelledImages, val: LabelledImages, shape: tuple[int, ...]) -> None:
        """`UserError` for numbers that cannot work."""
        if not all(type(k) is int and k > 0 for k in self.shots) or not all(
            isinstance(share, float) and 0 < share < 1 for share in self.shares
        ):
            given = f"shots {self.shots}, shares {self.shares}"
            raise UserError(f"few labels: {given}: give whole numbers from 1, and shares between 0 and 1")
        if type(self.draws) is not int or self.draws < 1 or not self.penalty > 0 or not self.temperature > 0:
            raise UserError("few labels: draws, penalty and temperature have to be above 0, draws a whole number")
        fewest = int(np.bincount(train.labels).min())
        if not (self.files or self.shares or (self.shots and self.shots[0] <= fewest)):
            raise UserError(f"few labels: a class has {fewest} training images: give evaluation.shots of that or less")

    def read(self, train: LabelledImages) -> None:
        """Read the lists' files; `UserError` for one that names an image that is not there."""
        self.lists = {}
        for file in self.files:
            name = Path(file).stem
            if name in self.lists:
                raise UserError(f"few labels: list {file}: another has the name {name} too: rename one of them")
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", name):
                raise UserError(f"few labels: list {file}: rename it, to letters, digits, '.' and '-'")
            self.lists[name] = read_list(file, train)
            check_every_class(self.lists[name], train.labels, train.classes, f"few labels: {file}")

    def chosen(self, labels: Tensor, seed: int, log) -> dict[str, list[Tensor]]:
        """Key of the metrics -> rows with labels of every draw; labels (N,)."""
        fewest = int(labels.bincount().min())
        shots = [k for k in self.shots if k <= fewest]
        if left := [k for k in self.shots if k not in shots]:
            log(f"few labels: {', '.join(map(str, left))} per class left out, a class has {fewest} training images")
        ranks = [draw_ranks(labels, seed, draw) for draw in range(self.draws)]
        found = {f"few_shots{k}": [(rank < k).nonzero().flatten() for rank in ranks] for k in shots}
        for share in self.shares:
            found[f"few_percent{100 * share:g}"] = [share_of_each(labels, rank, share) for rank in ranks]
        return found | {f"few_list_{name}": [rows] for name, rows in self.lists.items()}

    def run(self, data: Frozen) -> Measured:
        """Mean and standard deviation over the draws, on the main process; nothing on the others.

        k-NN is of all processes, which divide the queries; the probe is of the main one alone.
        """
        bank, queries = (torch.from_numpy(np.array(part[0])).to(data.device) for part in (data.train, data.val))
        labels, truth = (torch.from_numpy(np.array(part[1])) for part in (data.train, data.val))
        metrics: dict[str, float] = {}
        scores: dict[str, np.ndarray] = {}
        for key, draws in self.chosen(labels, data.seed, data.log).items():
            hits: dict[str, list[np.ndarray]] = {"probe": [], "knn": []}
            for rows in draws:
                few, own = bank[rows.to(data.device)], labels[rows]
                if is_main_process():
                    hits["probe"].append(self.probe(few, own, queries, truth, data))
                k = max(1, min(20, len(rows) // data.classes))
                near = knn_hits(few, own, queries, truth, data.classes, [k], self.temperature, device=data.device)
                hits["knn"].append(near[k][:, 0].numpy())
            if not is_main_process():
                continue
            words = []
            for kind, rows_of in hits.items():
                accuracy = 100 * np.stack(rows_of).mean(axis=1)
                scores[f"{key}_{kind}_top1"] = np.mean(rows_of, axis=0)
                metrics[f"{key}_{kind}_top1"] = float(accuracy.mean())
                if len(draws) > 1:
                    metrics[f"{key}_{kind}_top1_std"] = float(accuracy.std(ddof=1))
                words.append(
                    f"{kind} {accuracy.mean():.2f}" + (f" +- {accuracy.std(ddof=1):.2f}" if len(draws) > 1 else "")
                )
            metrics[f"{key}_images"] = len(draws[0])
            data.log(f"{key}, {len(draws[0])} labels, {len(draws)} draws: {', '.join(words)}")
        return Measured(metrics, scores)

    def probe(self, few: Tensor, own: Tensor, queries: Tensor, truth: Tensor, data: Frozen) -> np.ndarray:
        """Whether each query is right, bool (M,)."""
        weight = fit_logistic(unit(few), own.to(data.device), data.classes, self.penalty)
        parts = zip(queries.split(4096), truth.to(data.device).split(4096), strict=True)
        return torch.cat([rank_of(unit(part) @ weight, right) < 1 for part, right in parts]).cpu().numpy()


@TASKS.register_module()
class FewLabelsTask(FeatureTask):
    """Top-1 accuracy with few labels; the table has the probe's at 1, 4 and 16 per class, and of shares and lists."""

    name = "few_labels"
    title = "few labels"
    place = 3
    metrics = {
        "few_shots1_probe_top1": Metric("probe, 1 per class", "1 label per class"),
        "few_shots4_probe_top1": Metric("probe, 4 per class"),
        "few_shots16_probe_top1": Metric("probe, 16 per class", "16 labels per class"),
    }
    evaluation = {"type": "FewLabels"}

    def reported(self, names: Iterable[str]) -> dict[str, Metric]:
        """The probe's, of the numbers of images in `TABLED` or if there are none all, and of all shares and lists."""
        found = {name: match for name in names if (match := KEY.fullmatch(name)) and match[3] == "probe"}
        shots = {name for name, match in found.items() if match[1] == "shots"}
        some = {name for name in shots if found[name][2] in TABLED} or shots
        words = {"shots": "{} per class", "percent": "{} % of the labels", "list": "{}"}
        return {
            name: self.metrics.get(name) or Metric(f"probe, {words[match[1]].format(match[2])}")
            for name, match in found.items()
            if match[1] != "shots" or name in some
        }
