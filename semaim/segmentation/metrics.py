"""mmseg's mIoU, with the number of classes that it is the mean of, and what it is the mean of per image."""

import numpy as np
from mmengine.logging import MMLogger
from mmseg.evaluation import IoUMetric


class CountedIoUMetric(IoUMetric):
    """mmseg's `IoUMetric`, with the same figures.

    Attributes:
        counted: (classes in the mean, all classes) of the last evaluation.
        areas: float32 (M, C, 2), intersections and unions of the C classes in each of its M images, in the order of
            the data set; on the main process. mIoU is the mean over the classes of the ratio of their sums, without
            classes of union 0.

    A class that is neither in the labels nor in a prediction has no IoU, and mmseg leaves it out of the mean, so an
    mIoU of 100 may be that of a single class. A class that is predicted, but in no label, counts with an IoU of 0.
    """

    default_prefix = ""  # no prefix; None would make mmengine warn
    counted: tuple[int, int] | None = None
    areas: np.ndarray | None = None

    def compute_metrics(self, results: list[tuple]) -> dict[str, float]:
        """Areas per class of every image (intersections, unions, predictions, labels) -> mIoU and the other figures."""
        metrics = super().compute_metrics(results)
        if not metrics or self.nan_to_num is not None:  # nothing was measured, or every class counts
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
