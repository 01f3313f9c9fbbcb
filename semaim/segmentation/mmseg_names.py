"""Names of weights in mmseg's UperNet with MAE and ours: the backbone's differ, those of necks and heads are the same.

Source: mmseg 1.2.2, configs/mae; files released for 0.x have the same names.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from semaim.checkpoints.dialects import INERT, MMPRETRAIN, rename
from semaim.errors import UserError
from semaim.models.segvit import bias_index


def our_name(name: str) -> str | None:
    """mmseg's name of a segmentor's tensor -> ours; None for a tensor of a backbone that ours does not have."""
    if not name.startswith("backbone."):
        return name
    renamed = rename(name, MMPRETRAIN)
    return renamed and f"backbone.{renamed}"


def to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a whole segmentor under our names.

    The indices into the bias tables are left out, as they are computed; they have to be those of a square crop.

    Raises:
        ValueError: a tensor belongs to a different backbone.
    """
    renamed = {}
    for name, tensor in state.items():
        if name.endswith(INERT):
            side = math.isqrt(len(tensor) - 1)  # the class token has a row, too
            if side * side != len(tensor) - 1 or not torch.equal(tensor, bias_index((side, side), tensor.device)):
                raise ValueError(f"{name} is not that of square crops: the bias tables have another order")
        elif ours := our_name(name):
            renamed[ours] = tensor
        else:
            raise ValueError(f"it is not mmseg's MAE: the backbone here does not have {name}")
    return renamed


def foreign_weights(content: Any, model: nn.Module, path: str | os.PathLike) -> dict[str, Tensor] | None:
    """The weights of a file with mmseg's names under the names of our segmentor; None for a file with ours.

    Args:
        content: of the file, from `safe_reading.read_file`.
        model: the segmentor.
        path: of the file, for error messages.

    Raises:
        UserError: the file is of another model, or one of ours with the position table of the pretraining.
    """
    held = (content.get(key) for key in ("model", "state_dict"))
    state: Mapping[str, Tensor] = next((weights for weights in held if isinstance(weights, Mapping)), {})
    try:
        if "backbone.patch_embed.projection.weight" in state:
            return to_ours(state)
    except ValueError as error:
        raise UserError(f"{path} does not fit this config: {error}") from None
    positions, biases = (state.get(f"backbone.{name}") for name in ("pos_embed", "blocks.0.attn.rel_bias"))
    if positions is not None and biases is not None:
        patches = positions.shape[1] - 1
        # H x W patches have (2 H - 1) (2 W - 1) + 3 biases, so between 2 H W + 2 and 4 H W.
        if not 2 * patches + 2 <= len(biases) <= 4 * patches:
            raise UserError(
                f"{path} is of an older version, which kept the pretraining's table of {patches} positions and"
                " resampled it in each pass, antialiased: test it with that version, or train again"
            )
    return None
