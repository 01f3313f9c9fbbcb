"""Semantic segmentation by mmseg, UperNet on four maps of the encoder: ADE20K, or a data set in its layout."""

from collections.abc import Mapping

import torch
from mmengine.config import Config
from torch.utils.data import Dataset

from semaim.engine.dense_task import DenseTask
from semaim.engine.schedule import BatchPlan
from semaim.errors import UserError
from semaim.registry import TASKS, Metric


@TASKS.register_module()
class Segmentation(DenseTask):
    """Mean IoU over the classes."""

    name = "segmentation"
    title = "segmentation"
    place = 8
    scope = "mmseg"
    package = "semaim.segmentation"
    needs = "mmseg"
    metrics = {"mIoU": Metric("mIoU", "mIoU"), "mAcc": Metric("mAcc"), "aAcc": Metric("aAcc")}
    configs = {
        "quick": "mmseg_configs/semaim_upernet_scenes_easy.py",
        "study": "mmseg_configs/semaim_upernet_cifar10.py",
        "paper": "mmseg_configs/semaim_upernet.py",
    }
    shows = "classes of validation images, annotated (left) and found"
    source = "ade"
    weight = 3

    def check_plan(self, cfg: Config, plan: BatchPlan, processes: int) -> None:
        """UperNet's pyramid normalises maps of one pixel, where a batch of one image has no variance."""
        if plan.images * (processes if torch.cuda.is_available() else 1) < 2:
            raise UserError(
                "a segmentor's batch normalisation needs 2 images a pass: raise images_per_gpu or the batch"
            )

    def describe_data(self, cfg: Config, sets: Mapping[str, Dataset]) -> list[str]:
        """Which values the label maps have, and which class each trains; docs/labels.md has the rules."""
        from semaim.segmentation.labels import check_labels  # needs mmseg, which `enter` has checked for

        return check_labels(cfg, sets)

    def matches(self, cfg: Mapping) -> bool:
        """See `Task.matches`."""
        return cfg.get("default_scope") == self.scope
