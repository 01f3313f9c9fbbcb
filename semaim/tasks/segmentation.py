"""Semantic segmentation by mmseg, UperNet on four maps of the encoder: ADE20K, or a data set in its layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch.utils.data import Dataset

from semaim.engine.dense_task import DenseTask
from semaim.engine.schedule import BatchPlan
from semaim.errors import UserError
from semaim.outcomes import write_outcomes
from semaim.prediction.predictor import Options, Predictor
from semaim.registry import TASKS, Metric


class SegmentationTask(DenseTask):
    """What the tasks on mmseg's data share: labels, metrics, and each image's part in the mIoU."""

    scope = "mmseg"
    package = "semaim.segmentation"
    needs = "mmseg"
    shows = "classes of validation images, annotated (left) and found"
    source = "ade"

    def describe_data(self, cfg: Config, sets: Mapping[str, Dataset]) -> list[str]:
        """Which values the label maps have, and which class each trains; docs/labels.md has the rules."""
        from semaim.segmentation.labels import check_labels  # needs mmseg, which `enter` has checked for

        return check_labels(cfg, sets)

    def keep_outcomes(self, cfg: Config, images: Any, metric: Any) -> None:
        """Write the intersections and unions of each validation image, if this metric has them."""
        if getattr(metric, "areas", None) is None:  # another metric, or another process than the main one
            return
        root = Path(cfg.val_dataset.data_root)
        paths = [Path(images.get_data_info(index)["img_path"]) for index in range(len(images))]
        names = [(path.relative_to(root) if path.is_relative_to(root) else path).as_posix() for path in paths]
        write_outcomes(Path(cfg.work_dir), names, {"mIoU": metric.areas})

    def predictor(self, cfg: Config, weights: str, options: Options) -> Predictor:
        """See `Task.predictor`."""
        from semaim.prediction.dense import ClassMapPredictor

        return ClassMapPredictor(cfg, weights, options) if self.trains else super().predictor(cfg, weights, options)


@TASKS.register_module()
class Segmentation(SegmentationTask):
    """Mean IoU over the classes."""

    name = "segmentation"
    title = "segmentation"
    place = 8
    metrics = {"mIoU": Metric("mIoU", "mIoU"), "mAcc": Metric("mAcc"), "aAcc": Metric("aAcc")}
    configs = {
        "quick": "mmseg_configs/semaim_upernet_scenes_easy.py",
        "study": "mmseg_configs/semaim_upernet_cifar10.py",
        "paper": "mmseg_configs/semaim_upernet.py",
    }
    weight = 3

    def check_plan(self, cfg: Config, plan: BatchPlan, processes: int) -> None:
        """UperNet's pyramid normalises maps of one pixel, where a batch of one image has no variance."""
        if plan.images * (processes if torch.cuda.is_available() else 1) < 2:
            raise UserError(
                "a segmentor's batch normalisation needs 2 images a pass: raise images_per_gpu or the batch"
            )

    def matches(self, cfg: Mapping) -> bool:
        """See `Task.matches`."""
        return cfg.get("default_scope") == self.scope
