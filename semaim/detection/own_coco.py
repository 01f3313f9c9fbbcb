"""One COCO annotation file for training and validation: a share of its images is held out."""

from typing import Any

from mmdet.datasets import CocoDataset

from semaim.data.pairs import HELD_OUT, part_of


class PartOfCoco(CocoDataset):
    """mmdet's `CocoDataset` without the images of the other part, see `semaim.data.pairs.held_out`.

    Args:
        part: "train" or "val".
        held_out: share of the images that is "val".
        **options: of `CocoDataset`.
    """

    data_list: list[dict]

    def __init__(self, part: str = "train", held_out: float = HELD_OUT, **options: Any):
        self.part, self.held_out = part, held_out
        super().__init__(**options)

    def filter_data(self) -> list[dict]:
        """The images of the part, and of these what mmdet keeps."""
        start = len(self.data_prefix["img"].rstrip("/")) + 1
        names = [info["img_path"][start:] for info in self.data_list]
        kept = part_of(names, self.part, self.held_out)
        self.data_list = [info for info, name in zip(self.data_list, names, strict=True) if name in kept]
        return super().filter_data()
