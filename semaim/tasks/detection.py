"""Detection and instance segmentation by mmdet on the ViTDet backbone: COCO, or a data set in its layout."""

from collections.abc import Mapping

from semaim.engine.dense_task import DenseTask
from semaim.registry import TASKS, Metric


def _average_precision(label: str, short: str = "", tabled: bool = False) -> Metric:
    return Metric(label, short, factor=100, tabled=tabled, least=0)  # COCO's -1: there were no objects


@TASKS.register_module()
class Detection(DenseTask):
    """Box and mask AP by COCO's metric."""

    name = "detection"
    title = "detection"
    place = 7
    scope = "mmdet"
    package = "semaim.detection"
    needs = "mmdet"
    metrics = {
        "coco/bbox_mAP": _average_precision("AP box", "box AP", tabled=True),
        "coco/bbox_mAP_50": _average_precision("AP50 box", "box AP50"),
        "coco/bbox_mAP_75": _average_precision("AP75 box"),
        "coco/bbox_mAP_s": _average_precision("AP box, small objects"),
        "coco/bbox_mAP_m": _average_precision("AP box, medium objects"),
        "coco/bbox_mAP_l": _average_precision("AP box, large objects"),
        "coco/segm_mAP": _average_precision("AP mask", "mask AP", tabled=True),
        "coco/segm_mAP_50": _average_precision("AP50 mask", "mask AP50"),
        "coco/segm_mAP_75": _average_precision("AP75 mask"),
        "coco/segm_mAP_s": _average_precision("AP mask, small objects"),
        "coco/segm_mAP_m": _average_precision("AP mask, medium objects"),
        "coco/segm_mAP_l": _average_precision("AP mask, large objects"),
    }
    configs = {
        "quick": "mmdet_configs/semaim_mask_rcnn_scenes_easy.py",
        "study": "mmdet_configs/semaim_mask_rcnn_cifar10.py",
        "paper": "mmdet_configs/semaim_mask_rcnn.py",
    }
    shows = "objects of validation images, annotated (left) and found"
    source = "coco"
    weight = 4

    def matches(self, cfg: Mapping) -> bool:
        """See `Task.matches`."""
        return cfg.get("default_scope") == self.scope
