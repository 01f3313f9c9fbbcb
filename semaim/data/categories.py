"""The categories of a COCO annotation file against the classes of a config: the same, in one order, or a chosen subset.

mmdet numbers classes by the order of the categories in the file, whatever the order in the config, and ignores names
that occur in only one of the two. With other categories in the file, it silently trains and measures something else.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from itertools import compress

from semaim.data.findings import shortened
from semaim.errors import UserError


@dataclass
class Categories:
    """The categories of an annotation file, and its annotations of them.

    Attributes:
        file: the file.
        names: of the categories, in its order.
        ids: of the categories, in its order.
        labels: of every annotation, an index into `names`.
        images: of every annotation, the id of its image.
    """

    file: str
    names: list[str]
    ids: list[int | str]
    labels: list[int]
    images: list[int | str]

    def among(self, images: Container[int | str]) -> "Categories":
        """The same with the annotations of these images alone, named by their ids."""
        kept = [image in images for image in self.images]
        return replace(self, labels=[*compress(self.labels, kept)], images=[*compress(self.images, kept)])

    def left_out(self, classes: Sequence[str]) -> dict[str, int]:
        """What `classes` leaves out: counts of categories, annotations, and images without an annotation of a class."""
        kept = [name in classes for name in self.names]
        keeps = [kept[label] for label in self.labels]
        return {
            "categories": kept.count(False),
            "of_categories": len(kept),
            "annotations": keeps.count(False),
            "of_annotations": len(keeps),
            "images": len(set(self.images) - set(compress(self.images, keeps))),
        }


def check_categories(found: Categories, classes: Sequence[str], chosen: bool) -> None:
    """Raise `UserError` if the file's categories are not the classes.

    Args:
        found: the file's categories.
        classes: of the data set in the config, in its order.
        chosen: whether the classes may be a subset of the file's categories.
    """
    extra = [name for name in found.names if name not in classes]
    missing = [name for name in classes if name not in found.names]
    common = [name for name in found.names if name in classes]
    if len(set(found.names)) < len(found.names):
        twice = next(name for name in found.names if found.names.count(name) > 1)
        raise UserError(f"{found.file}: two categories have the name {twice!r}: give each its own")
    if missing or (extra and not chosen):
        lists = []
        if missing:
            lists += [f"{len(missing)} of the config's {len(classes)} classes are not in it: {shortened(missing)}"]
        if extra:
            lists += [f"{len(extra)} of its {len(found.names)} categories are not in the config: {shortened(extra)}"]
        keep = f'; to keep the {len(common)} that are in both: --cfg-options "keep_classes=[{",".join(common)}]"'
        raise UserError(
            f"{found.file}: {'; '.join(lists)}. List the file's categories in the config (metainfo.classes of both data"
            f" sets, num_classes of the heads){keep * bool(common)}"
        )
    if common != list(classes):
        place = next(i for i, pair in enumerate(zip(common, classes, strict=True)) if pair[0] != pair[1])
        raise UserError(
            f"{found.file}: its categories are in another order than the config's classes ({common[place]!r} where"
            f" the config has {classes[place]!r}), and mmdet numbers them by the file: list the classes in the order of"
            " the file, which has to be the same for training and validation"
        )
    ids = [number for number, name in zip(found.ids, found.names, strict=True) if name in classes]
    if ids != sorted(ids):  # pycocotools sorts them, mmdet's table by class does not
        raise UserError(f"{found.file}: its categories are not sorted by id: sort its list 'categories'")
