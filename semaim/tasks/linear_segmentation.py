"""Linear segmentation: a linear classifier of a frozen encoder's patches, trained on mmseg's data, as by DINOv2."""

from semaim.registry import TASKS, Metric
from semaim.tasks.segmentation import SegmentationTask


@TASKS.register_module()
class LinearSegmentation(SegmentationTask):
    """Mean IoU over the classes."""

    name = "linear_segmentation"
    title = "linear segmentation"
    place = 10
    metrics = {"mIoU": Metric("mIoU", "linear mIoU"), "mAcc": Metric("mAcc"), "aAcc": Metric("aAcc")}
    published = False
