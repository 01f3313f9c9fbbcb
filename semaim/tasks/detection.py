"""Detection and instance segmentation by mmdet on the ViTDet backbone: COCO, or a data set in its layout."""

import re
from collections.abc import Iterable, Mapping

from mmengine.config import Config

from semaim.engine.dense_task import DenseTask
from semaim.prediction.predictor import Options, Predictor
from semaim.registry import TASKS, Metric

BY_CLASS = re.compile(r"coco/(.+)_precision")  #: keys of mmdet's CocoMetric with `classwise`


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

    def described(self, names: Iterable[str]) -> dict[str, Metric]:
        """Also the APs by class: mmdet gives those of boxes and masks one key, which keeps the last, the masks'."""
        names = list(names)
        kind = "mask" if "coco/segm_mAP" in names else "box"
        by_class = {name: match[1] for name in names if (match := BY_CLASS.fullmatch(name))}
        more = {name: _average_precision(f"AP {kind}, {label}") for name, label in by_class.items()}
        return super().described(names) | more

    def predictor(self, cfg: Config, weights: str, options: Options) -> Predictor:
        """See `Task.predictor`."""
        from semaim.prediction.dense import ObjectPredictor

        return ObjectPredictor(cfg, weights, options)

    def matches(self, cfg: Mapping) -> bool:
        """See `Task.matches`."""
        return cfg.get("default_scope") == self.scope
