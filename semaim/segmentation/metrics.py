"""mmseg's mIoU, with the number of classes that it is the mean of, and what it is the mean of per image."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from mmengine.logging import MMLogger
from mmseg.evaluation import IoUMetric

from semaim.engine.dense_neighbours import patch_classes

OF_PATCHES = "by patches, of which each counts as the class that most of its pixels have:"


class CountedIoUMetric(IoUMetric):
    """mmseg's `IoUMetric`, with the same figures.

    Args:
        patch_size: P; also measures patches of P x P pixels of the network's input, each as the class that most of its
            pixels have, annotated and found (`patch_mIoU`); None: pixels alone.
        iou_metrics: what is measured: "mIoU", and as mmseg has it "mDice" and "mFscore".
        **metric: further ones of mmseg's `IoUMetric`.

    Attributes:
        counted: (classes in the mean, all classes) of the last evaluation.
        classwise: "IoU" and "Acc" -> class -> percent, of the last evaluation; None for a class that has none.
        areas: float32 (M, C, 2), intersections and unions of the C classes in each of its M images, in the order of
            the data set; on the main process. mIoU is the mean over the classes of the ratio of their sums, without
            classes of union 0.

    A class that is neither in the labels nor in a prediction has no IoU, and mmseg leaves it out of the mean, so an
    mIoU of 100 may be that of a single class. A class that is predicted, but in no label, counts with an IoU of 0.
    """

    default_prefix = ""  # no prefix; None would make mmengine warn
    counted: tuple[int, int] | None = None
    classwise: Mapping[str, Mapping[str, float | None]] | None = None
    areas: np.ndarray | None = None

    def __init__(self, patch_size: int | None = None, **metric: Any):
        super().__init__(**metric)
        self.patch_size = patch_size

    def process(self, data_batch: Any, data_samples: Sequence[Mapping]) -> None:
        """Add images: areas per class of their pixels and, if it measures patches, of these."""
        before = len(self.results)
        super().process(data_batch, data_samples)
        if self.patch_size is None:
            return
        classes, ignored = len(self.dataset_meta["classes"]), self.ignore_index
        for place, sample in enumerate(data_samples, before):
            rows, columns = (-(-side // self.patch_size) for side in sample["img_shape"][:2])
            maps = (sample[key]["data"].squeeze(0) for key in ("pred_sem_seg", "gt_sem_seg"))
            found, labels = (patch_classes(one, (rows, columns), classes, ignored) for one in maps)
            self.results[place] += self.intersect_and_union(found, labels.to(found.device), classes, ignored)

    def compute_metrics(self, results: list[tuple]) -> dict[str, float]:
        """Areas per class of every image (intersections, unions, predictions, labels) -> mIoU and the other figures.

        Those of its patches follow, where it measures them.
        """
        if self.patch_size is None:
            return self.pixels(results)
        metrics = self.pixels([areas[:4] for areas in results])
        MMLogger.get_current_instance().info(OF_PATCHES)
        of_patches = super().compute_metrics([areas[4:] for areas in results])
        return metrics | {f"patch_{name}": value for name, value in of_patches.items()}

    def pixels(self, results: list[tuple]) -> dict[str, float]:
        """The figures of the pixels, from their areas."""
        metrics = super().compute_metrics(results)
        if not metrics:  # nothing was measured
            return metrics
        self.classwise = self.by_class(results)
        if self.nan_to_num is not None:  # every class counts
            return metrics
        pairs = [np.stack([intersection.numpy(), union.numpy()], axis=-1) for intersection, union, *_ in results]
        self.areas = np.stack(pairs).astype(np.float32)
        united, labelled = (sum(areas).tolist() for areas in list(zip(*results, strict=True))[1::2])
        classes = list(zip(self.dataset_meta["classes"], united, labelled, strict=True))
        self.counted = sum(union > 0 for _, union, _ in classes), len(classes)
        text = f"mean over {self.counted[0]} of {self.counted[1]} classes"
        if left := [name for name, union, _ in classes if not union]:
            text += f"; in no label and no prediction: {', '.join(left)}"
        if wrong := [name for name, union, label in classes if union and not label]:
            text += f"; predicted, but in no label: {', '.join(wrong)}"
        MMLogger.get_current_instance().info(text)
        return metrics

    def by_class(self, results: list[tuple]) -> dict[str, dict[str, float | None]]:
        """`classwise` from the areas: mmseg's own figures, which its means are of and which it only logs."""
        sums = [sum(areas) for areas in zip(*results, strict=True)]
        found = self.total_area_to_metrics(*sums, ["mIoU"], self.nan_to_num, self.beta)
        names = self.dataset_meta["classes"]
        percents = {kind: (100 * np.asarray(found[kind], dtype=np.float64)).round(2) for kind in ("IoU", "Acc")}
        return {
            kind: {name: None if np.isnan(value) else float(value) for name, value in zip(names, values, strict=True)}
            for kind, values in percents.items()
        }
