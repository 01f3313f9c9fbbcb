"""Padding of images of any size to one square."""

from mmdet.models import DetDataPreprocessor

from semaim.errors import UserError


class SquarePadding(DetDataPreprocessor):
    """Normalise, then pad with zeros at the bottom and right to one square, in training and in testing.

    Features and anchors cover the padding; boxes are clipped to `img_shape`, the image without it. So the encoder sees
    the grid its relative positions were made for, and an image's detections do not depend on the others in its batch.
    mmdet's own `BatchFixedSizePad` is applied in training only.

    Args:
        side: of the square in pixels. A larger image raises `UserError`.
        mean, std: of the three channels, of pixels from 0 to 255.
        bgr_to_rgb: whether images are read with the channels BGR, as OpenCV does, and turned to RGB.
        pad_mask: whether the masks of objects are padded too, which training on masks needs.
        **arguments: further ones of mmdet's `DetDataPreprocessor`.

    Source: `square_pad` of detectron2's ViTDet, which crops a larger image.
    """

    def __init__(self, side: int, **arguments):
        super().__init__(pad_size_divisor=side, **arguments)
        self.side = side

    def forward(self, data: dict, training: bool = False) -> dict:
        """Images (3, height, width) and their data samples -> a batch (B, 3, side, side), and the same samples."""
        for height, width in (image.shape[-2:] for image in data["inputs"]):
            if max(height, width) > self.side:
                square = f"{self.side} x {self.side}"
                raise UserError(
                    f"an image of {width} x {height} pixels is larger than the detector's {square}: resize it in the"
                    " pipeline, or raise model.data_preprocessor.side and model.backbone.img_size"
                )
        return super().forward(data, training)
