"""Linear segmentation: a linear classifier of a frozen encoder's patches, trained on mmseg's data, as by DINOv2."""

from mmengine.config import Config
from mmengine.registry import METRICS

from semaim.engine.classes import registered, takes
from semaim.engine.training import Prepared
from semaim.registry import TASKS, Metric
from semaim.tasks.segmentation import SegmentationTask


@TASKS.register_module()
class LinearSegmentation(SegmentationTask):
    """Mean IoU over the classes, of pixels and of patches: what most pixels of a patch are, annotated and found."""

    name = "linear_segmentation"
    title = "linear segmentation"
    place = 10
    metrics = {
        "mIoU": Metric("mIoU", "linear mIoU"),
        "mAcc": Metric("mAcc"),
        "aAcc": Metric("aAcc"),
        "patch_mIoU": Metric("mIoU of patches", tabled=False),
        "patch_aAcc": Metric("aAcc of patches", tabled=False),
    }
    published = False

    def validation(self, cfg: Config, run: Prepared, mode: str) -> dict:
        """mmengine's arguments for a validation or test; patches are measured unless several scales are averaged."""
        arguments = super().validation(cfg, run, mode)
        evaluator = arguments[f"{mode}_evaluator"]
        if not cfg.get("tta") and takes(registered(cfg, METRICS, evaluator["type"], "val_evaluator"), "patch_size"):
            evaluator.setdefault("patch_size", cfg.model.backbone.get("patch_size"))
        return arguments
