"""Box and mask heads that start as detectron2's.

mmdet's start alike but for two layers: the box head's first linear layer (uniform, there as wide as its inputs alone
call for) and the mask head's last one (normal, std 0.16 in place of 0.001: masks start undecided).

Source: detectron2 at 02b5c4e, modeling/roi_heads/{box_head,mask_head}.py; fvcore's weight_init.
"""

from mmdet.models import FCNMaskHead, Shared4Conv1FCBBoxHead
from torch import nn


class ViTDetBoxHead(Shared4Conv1FCBBoxHead):
    """mmdet's head of four convolutions and a linear layer; arguments as there."""

    def init_weights(self) -> None:
        """As mmdet's, but linear layers before the last are uniform within sqrt(3 / inputs): std 1 / sqrt(inputs)."""
        super().init_weights()
        for layer in self.shared_fcs:
            nn.init.kaiming_uniform_(layer.weight, a=1)


class ViTDetMaskHead(FCNMaskHead):
    """mmdet's head of four convolutions, a transposed one and a predictor; arguments as there."""

    def init_weights(self) -> None:
        """As mmdet's, but the predictor is normal of std 0.001."""
        super().init_weights()
        nn.init.normal_(self.conv_logits.weight, std=0.001)
