"""Names of weights in detectron2's whole ViTDet detectors, Mask R-CNN and Cascade, and ours.

Background is the last class in both, and anchors, deltas and flattened regions have the same order, so the weights only
need new names.
Source: projects/ViTDet of detectron2 at 02b5c4e.
"""

import math
import re
from collections.abc import Mapping

from torch import Tensor

from semaim.errors import UserError

#: Level of the pyramid -> indices in `simfp_N` of the resampling layers, the 1x1 and the 3x3 convolution.
PYRAMID = {2: ((0, 1, 3), 4, 5), 3: ((0,), 1, 2), 4: ((), 0, 1), 5: ((), 1, 2)}

#: detectron2's names (patterns) and ours. The pattern of a norm inside a convolution precedes that of the convolution.
RENAMES = [(r"backbone\.net\.(.+)", r"backbone.\1")]
for _level, (_resample, _lateral, _output) in PYRAMID.items():
    _theirs, _ours = rf"backbone\.simfp_{_level}\.", f"neck.levels.p{_level}."
    RENAMES += [(rf"{_theirs}{place}\.(\w+)", rf"{_ours}resample.{place}.\1") for place in _resample]
    for _place, _part in ((_lateral, "lateral"), (_output, "output")):
        RENAMES += [(rf"{_theirs}{_place}\.norm\.(\w+)", rf"{_ours}{_part}_norm.\1")]
        RENAMES += [(rf"{_theirs}{_place}\.(\w+)", rf"{_ours}{_part}.\1")]
RENAMES += [
    (r"proposal_generator\.rpn_head\.conv\.conv(\d)\.(\w+)", r"rpn_head.rpn_conv.\1.conv.\2"),
    (r"proposal_generator\.rpn_head\.conv\.(weight|bias)", r"rpn_head.rpn_conv.\1"),  # one convolution has no number
    (r"proposal_generator\.rpn_head\.objectness_logits\.(\w+)", r"rpn_head.rpn_cls.\1"),
    (r"proposal_generator\.rpn_head\.anchor_deltas\.(\w+)", r"rpn_head.rpn_reg.\1"),
    # (\d\.)? is the stage of a cascade.
    (r"roi_heads\.box_head\.(\d\.)?conv(\d)\.norm\.(\w+)", r"roi_head.bbox_head.\1shared_convs.{\2}.ln.\3"),
    (r"roi_heads\.box_head\.(\d\.)?conv(\d)\.(\w+)", r"roi_head.bbox_head.\1shared_convs.{\2}.conv.\3"),
    (r"roi_heads\.box_head\.(\d\.)?fc(\d)\.(\w+)", r"roi_head.bbox_head.\1shared_fcs.{\2}.\3"),
    (r"roi_heads\.box_predictor\.(\d\.)?cls_score\.(\w+)", r"roi_head.bbox_head.\1fc_cls.\2"),
    (r"roi_heads\.box_predictor\.(\d\.)?bbox_pred\.(\w+)", r"roi_head.bbox_head.\1fc_reg.\2"),
    (r"roi_heads\.mask_head\.mask_fcn(\d)\.norm\.(\w+)", r"roi_head.mask_head.convs.{\1}.ln.\2"),
    (r"roi_heads\.mask_head\.mask_fcn(\d)\.(\w+)", r"roi_head.mask_head.convs.{\1}.conv.\2"),
    (r"roi_heads\.mask_head\.deconv\.(\w+)", r"roi_head.mask_head.upsample.\1"),
    (r"roi_heads\.mask_head\.predictor\.(\w+)", r"roi_head.mask_head.conv_logits.\1"),
]

#: Buffers that are not weights: pixel statistics, which the preprocessor has, and anchors, which are generated.
INERT = re.compile(r"pixel_mean|pixel_std|proposal_generator\.anchor_generator\.cell_anchors\.\d+")


def our_name(name: str) -> str | None:
    """detectron2's name of a weight -> ours; None for a name that its ViTDet detectors do not have."""
    for theirs, ours in RENAMES:
        if match := re.fullmatch(theirs, name):
            # {n}: detectron2 counts these from 1, mmdet from 0. A group that did not match is empty.
            return re.sub(r"\{(\d+)\}", lambda number: str(int(number[1]) - 1), match.expand(ours))
    return None


def to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a whole detector under our names, without the class token's position, which is unused.

    Raises:
        UserError: a tensor is not a weight or buffer of these detectors.
    """
    ours = {name: our_name(name) for name in state if not INERT.fullmatch(name)}
    if unknown := [name for name, renamed in ours.items() if renamed is None]:
        raise UserError(f"no weight of detectron2's ViTDet detectors: {', '.join(unknown[:3])}")
    renamed = {new: state[name] for name, new in ours.items() if new}
    table = renamed.get("backbone.pos_embed")
    if table is not None and math.isqrt(table.shape[1]) ** 2 != table.shape[1]:  # 1 + 14 x 14
        renamed["backbone.pos_embed"] = table[:, 1:]
    return renamed
