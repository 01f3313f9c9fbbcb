"""Box and mask heads with detectron2's initialisation.

mmdet's differs in two layers. The box head's first linear layer is uniform in both; detectron2's range depends only on
the number of inputs. The mask head's last layer is normal with std 0.001, so that masks start undecided; in mmdet with
std 0.16.

Source: detectron2 at 02b5c4e, modeling/roi_heads/{box_head,mask_head}.py; fvcore's weight_init.
"""

from mmdet.models import FCNMaskHead, Shared4Conv1FCBBoxHead
from torch import nn


class ViTDetBoxHead(Shared4Conv1FCBBoxHead):
    """mmdet's head of four convolutions and a linear layer; arguments as mmdet's."""

    def init_weights(self) -> None:
        """As mmdet's, but linear layers before the last are uniform within sqrt(3 / inputs): std 1 / sqrt(inputs)."""
        super().init_weights()
        for layer in self.shared_fcs:
            nn.init.kaiming_uniform_(layer.weight, a=1)


class ViTDetMaskHead(FCNMaskHead):
    """mmdet's head of four convolutions, a transposed one and a predictor; arguments as mmdet's."""

    def init_weights(self) -> None:
        """As mmdet's, but the predictor is normal with std 0.001."""
        super().init_weights()
        nn.init.normal_(self.conv_logits.weight, std=0.001)
