"""COCO's annotations, which a data set, its metric and our own checks share while a run is prepared.

The file of COCO's training images has 450 MB: to parse it takes longer than all other preparation together.
"""

from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmdet.evaluation.metrics import coco_metric

from semaim.data.verify import read_json


class SharedCOCO(COCO):
    """mmdet's, of a file that `semaim.reading.read_once` has read once. Each has an index of its own."""

    def __init__(self, annotation_file: str | None = None):
        super().__init__()
        if annotation_file is not None:
            self.dataset = read_json(annotation_file)
            self.createIndex()
            self.img_ann_map, self.cat_img_map = self.imgToAnns, self.catToImgs


def install() -> None:
    """Have mmdet's data sets and metrics of COCO's format read by `SharedCOCO`."""
    CocoDataset.COCOAPI = SharedCOCO
    coco_metric.COCO = SharedCOCO
