"""Images and label maps of a data set of one's own: any suffixes, stated values, a held-out share."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmseg.datasets import BaseSegDataset

from semaim.data.described import UNLISTED, renumbered, unclear
from semaim.data.label_rules import IGNORED
from semaim.data.pairs import HELD_OUT, pair_up, part_of
from semaim.errors import UserError


class OwnLabelMaps(BaseSegDataset):
    """Pairs of an image and a label map of the same name, in two folders and the folders below them.

    Args:
        values: for each class, the values of the label maps that mean it.
        ignored: values that mean no class.
        part: "train" or "val", of a data set without validation split; None for all pairs.
        held_out: share of the images that is "val".
        image_suffix, label_suffix: of `semaim.data.pairs.pair_up`.
        **options: of mmseg's `BaseSegDataset`, without suffixes; `ann_file` is a list of names without suffix.

    Attributes:
        label_map: value of the files -> number of the class, of the values that differ from it; None if none does.
    """

    def __init__(
        self,
        values: Sequence[Sequence[int]] = (),
        ignored: Sequence[int] = (IGNORED,),
        part: str | None = None,
        held_out: float = HELD_OUT,
        image_suffix: str | None = None,
        label_suffix: str | None = None,
        **options: Any,
    ):
        if len(values) > UNLISTED:
            raise UserError(f"{len(values)} classes: label maps of 8 bits are read, with up to {UNLISTED}")
        self.values, self.ignored = [list(group) for group in values], list(ignored)
        self.part, self.held_out = part, held_out
        self.suffixes = image_suffix, label_suffix
        super().__init__(**options)
        self.label_map = self.renumbered()  # mmseg has set its own, from names alone

    def renumbered(self) -> dict[int, int] | None:
        """See `label_map`."""
        return renumbered(self.values, self.ignored) or None

    def load_data_list(self) -> list[dict]:
        """mmseg's record of every pair, in the order of the names."""
        images, labels = self.data_prefix["img_path"], self.data_prefix["seg_map_path"]
        pairs, _ = pair_up(images, labels, self.ann_file or None, *self.suffixes)
        if self.part:
            names = {image: image[len(images) :].lstrip("/") for image, _ in pairs}
            kept = part_of(names.values(), self.part, self.held_out)
            pairs = [(image, label) for image, label in pairs if names[image] in kept]
        shared: dict[str, Any] = {"label_map": self.renumbered(), "reduce_zero_label": False, "seg_fields": []}
        return [{"img_path": image, "seg_map_path": label, **shared} for image, label in pairs]

    def unclear(self, pixels: Mapping[int, int]) -> str | None:
        """Why these values, with their pixels, cannot be read as the classes; None if they can."""
        return unclear(self.values, self.ignored, list(self.metainfo["classes"]), pixels)
