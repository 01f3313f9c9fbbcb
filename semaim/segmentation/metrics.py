"""mmseg's mIoU, which also says over how many classes it is the mean."""

from mmengine.logging import MMLogger
from mmseg.evaluation import IoUMetric


class CountedIoUMetric(IoUMetric):
    """mmseg's `IoUMetric`, figures and all; `counted` is (classes in the mean, all classes) of the last evaluation.

    A class that is neither in the labels nor in a prediction has no IoU, and mmseg leaves it out of the mean: 100 of a
    single class may be all there is. One that is predicted, but in no label, counts with an IoU of 0.
    """

    default_prefix = ""  # none, without mmengine's warning that there is none
    counted: tuple[int, int] | None = None

    def compute_metrics(self, results: list[tuple]) -> dict[str, float]:
        """Areas of every image, of intersections, unions, predictions and labels by class -> mIoU and the others."""
        metrics = super().compute_metrics(results)
        if not metrics or self.nan_to_num is not None:  # nothing is measured, or every class counts
            return metrics
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
