"""Resizing and cropping of photos as in detectron2: Pillow's filters, its rounding of sizes, its crops.

Source: detectron2 at 02b5c4e, data/transforms; checked against it in `semaim.parity.detector_recipe`.
"""

import mmcv
import numpy as np
from mmdet.datasets.transforms import RandomCrop, Resize
from mmdet.structures.mask import BitmapMasks


class PillowResize(Resize):
    """Resize to an exact size with Pillow: photos bilinear, masks nearest.

    Pillow's bilinear filter widens when it shrinks an image (it is antialiased). OpenCV's, mmdet's default, reads four
    pixels whatever the factor.

    Args:
        scale: (width, height) of the result; mmdet's `ResizeShortestEdge` sets it for every photo.
    """

    def __init__(self, scale: tuple[int, int]):
        super().__init__(scale, keep_ratio=False, backend="pillow", interpolation="bilinear")

    def _resize_masks(self, results: dict) -> None:
        masks, size = results.get("gt_masks"), results["img_shape"]
        if isinstance(masks, BitmapMasks):  # mmdet's own method has no choice of backend
            resized = [mmcv.imresize(m, size[::-1], interpolation="nearest", backend="pillow") for m in masks]
            results["gt_masks"] = BitmapMasks(resized, *size)
        else:
            super()._resize_masks(results)


class ResizeScale(PillowResize):
    """Large-scale jitter: resize to the largest size that fits into a random multiple of `scale`, sides in proportion.

    Args:
        scale: (width, height).
        ratio_range: range of the multiple, drawn uniformly.
    """

    def __init__(self, scale: tuple[int, int], ratio_range: tuple[float, float] = (0.1, 2.0)):
        super().__init__(scale)
        self.target, self.ratio_range = scale, ratio_range

    def size(self, height: int, width: int, ratio: float) -> tuple[int, int]:
        """(width, height) in pixels of a photo at that multiple, rounded to the nearest, halves to even."""
        factor = min(self.target[0] * ratio / width, self.target[1] * ratio / height)
        return max(1, round(width * factor)), max(1, round(height * factor))

    def transform(self, results: dict) -> dict:
        """Resize photo, boxes and masks by one random multiple."""
        height, width = results["img"].shape[:2]
        self.scale = self.size(height, width, np.random.uniform(*self.ratio_range))
        return super().transform(results)


class FixedSizeCrop(RandomCrop):
    """A random crop of a photo that is larger than `crop_size`; boxes are recomputed from the cropped masks.

    One random number places the crop on both axes, so in a photo too large in both the crop lies along the diagonal.
    Photos and crops without objects are kept.

    Args:
        crop_size: (width, height).
    """

    def __init__(self, crop_size: tuple[int, int]):
        super().__init__(crop_size, allow_negative_crop=True, recompute_bbox=True)

    def _rand_offset(self, margin: tuple[int, int]) -> tuple[int, int]:
        share = np.random.uniform()
        return round(share * margin[0]), round(share * margin[1])
