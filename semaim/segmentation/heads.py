"""The head of linear segmentation."""

from collections.abc import Sequence
from typing import Any

from mmcv.cnn import build_norm_layer
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor


class LinearHead(BaseDecodeHead):
    """Batch normalisation and a 1 x 1 convolution: a linear classifier of patches. None of mmseg's heads is this.

    The loss and the predictions resize its logits bilinearly to the image, as for every head of mmseg's.

    Args:
        in_channels: of the map, or of each of several maps.
        num_classes: C.
        norm_cfg: of the batch normalisation.
        in_index: of the map in the backbone's output, or of several; several are concatenated.
        loss_decode: config of the loss.
        align_corners: how logits are resized, as in `torch.nn.functional.interpolate`.
        **head: further ones of mmseg's `BaseDecodeHead`.

    Source: DINOv2, dinov2/eval/segmentation/models/decode_heads/linear_head.py (`BNHead`).
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        num_classes: int,
        norm_cfg: dict,
        in_index: int | Sequence[int] = -1,
        **head: Any,
    ):
        several = [] if isinstance(in_channels, int) else list(in_channels)
        super().__init__(
            in_channels=in_channels,
            channels=sum(several) or in_channels,
            num_classes=num_classes,
            dropout_ratio=0,
            norm_cfg=norm_cfg,
            in_index=in_index,
            input_transform="resize_concat" if several else None,
            **head,
        )
        self.bn = build_norm_layer(norm_cfg, self.channels)[1]

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Maps (B, D, H, W) -> logits (B, C, H, W)."""
        return self.cls_seg(self.bn(self._transform_inputs(inputs)))
