"""COCO annotations, shared by a data set, its metric and our own checks while a run is prepared.

COCO's training annotations have 450 MB: parsing them takes longer than all other preparation together.
"""

import contextlib
import io

from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmdet.evaluation.metrics import coco_metric

from semaim.data.coco import read_json


class SharedCOCO(COCO):
    """mmdet's `COCO`, on a file that is read only once inside `semaim.reading.read_once`. Each has its own index."""

    def __init__(self, annotation_file: str | None = None):
        super().__init__()
        if annotation_file is not None:
            self.dataset = read_json(annotation_file)
            with contextlib.redirect_stdout(io.StringIO()):  # it prints two lines each time
                self.createIndex()
            for record in self.anns.values():
                record.setdefault("iscrowd", 0)  # as mmdet's data set takes it; COCO's metric needs the key
            self.img_ann_map, self.cat_img_map = self.imgToAnns, self.catToImgs


def install() -> None:
    """Make mmdet's COCO data sets and metrics use `SharedCOCO`."""
    CocoDataset.COCOAPI = SharedCOCO
    coco_metric.COCO = SharedCOCO
