"""The dialects of checkpoints: where each stores its weights, and how it names them.

Internally, weights have our names, which are timm's: `cls_token`, `pos_embed`, `patch_embed.proj`,
`blocks.N.{norm1,attn.qkv,attn.proj,norm2,mlp.fc1,mlp.fc2}`, `norm`, `fc_norm`, `head`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from semaim.checkpoints.files import FORMAT

#: Parts of a block in mmpretrain (left) and ours.
MMPRETRAIN_BLOCK = (
    ("ln1", "norm1"),
    ("attn.qkv", "attn.qkv"),
    ("attn.proj", "attn.proj"),
    ("ln2", "norm2"),
    ("ffn.layers.0.0", "mlp.fc1"),
    ("ffn.layers.1", "mlp.fc2"),
)
#: Further parts of a block in mmseg's segmentation backbones, MAE and BEiT.
MMSEG_BLOCK = (
    ("attn.relative_position_bias_table", "attn.rel_bias"),
    ("gamma_1", "gamma_1"),
    ("gamma_2", "gamma_2"),
)
#: A buffer of mmseg's that is not a weight: it is computed from the grid.
INERT = "attn.relative_position_index"
#: mmpretrain's names (left) and ours; {n} is a block. If two of its names map to one of ours, the first is written.
MMPRETRAIN = (
    ("backbone.cls_token", "cls_token"),
    ("backbone.pos_embed", "pos_embed"),
    ("backbone.patch_embed.projection", "patch_embed.proj"),
    *((f"backbone.layers.{{n}}.{foreign}", f"blocks.{{n}}.{own}") for foreign, own in MMPRETRAIN_BLOCK),
    ("backbone.ln1", "norm"),
    ("backbone.norm1", "norm"),  # before 1.0
    ("backbone.ln2", "fc_norm"),
    *((f"backbone.layers.{{n}}.{foreign}", f"blocks.{{n}}.{own}") for foreign, own in MMSEG_BLOCK),
    ("neck.bn", "head.0"),  # the batch normalisation of a linear probe
    ("neck.mask_token", "mask_token"),  # from here on MAE's decoder
    ("neck.decoder_embed", "decoder_embed"),
    ("neck.decoder_pos_embed", "decoder_pos_embed"),
    *((f"neck.decoder_blocks.{{n}}.{foreign}", f"decoder_blocks.{{n}}.{own}") for foreign, own in MMPRETRAIN_BLOCK),
    ("neck.ln1", "decoder_norm"),
    ("neck.decoder_pred", "decoder_pred"),
)
#: The head's name differs by classifier: on the class token, on the mean of the patches, in a probe.
MMPRETRAIN_HEADS = (("head.layers.head", "head"), ("head.fc", "head"), ("head.layers.head", "head.1"))

#: The dialects, first match first, by (content, place of the weights in it, prefix of the encoder's names, its names).
RECOGNISED = (
    ("semaim", lambda content, place, prefix, names: content.get("format") == FORMAT),
    ("official SemAIM", lambda content, place, prefix, names: isinstance(content.get("model"), str)),
    (
        "mmseg segmentor",
        lambda content, place, prefix, names: (
            "patch_embed.projection.weight" in names
            and any(str(name).startswith("decode_head.") for name in (content[place] if place else content))
        ),
    ),
    ("mmpretrain", lambda content, place, prefix, names: "patch_embed.projection.weight" in names),
    ("detectron2", lambda content, place, prefix, names: prefix.endswith("backbone.net.")),
    ("DINO", lambda content, place, prefix, names: place == "teacher"),
    ("detector or segmentor", lambda content, place, prefix, names: prefix.endswith("backbone.")),
    ("mae", lambda content, place, prefix, names: place == "model"),
    ("timm", lambda content, place, prefix, names: True),
)


def find_weights(content: Any) -> tuple[str, dict[str, Tensor]]:
    """The weights in a file's content: the key that holds them ("" for the top level), and the tensors by name."""
    if not isinstance(content, Mapping):
        return "", {}
    place = next((key for key in ("model", "state_dict", "teacher") if isinstance(content.get(key), Mapping)), "")
    weights = {}
    for name, value in (content[place] if place else content).items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.dtype.isnative:
            value = torch.as_tensor(value)
        if isinstance(name, str) and isinstance(value, Tensor):
            weights[name] = value
    return place, weights


def rename(name: str, pairs: Iterable[tuple[str, str]]) -> str | None:
    """Rename by the first pair whose left side equals or begins the name; None if no pair matches."""
    for left, right in pairs:
        pattern = re.escape(left).replace(r"\{n\}", r"(?P<n>\d+)") + r"(?P<rest>\..+)?"
        if match := re.fullmatch(pattern, name):
            return right.replace("{n}", match.groupdict().get("n") or "") + (match["rest"] or "")
    return None


def from_mmpretrain(weights: dict[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], list[str]]:
    """Weights under our names, and the names that have no counterpart.

    Args:
        weights: all of the file's.
        prefix: of the encoder's names: "backbone.", or "" in a file of the encoder alone.
    """
    root = prefix.removesuffix("backbone.")
    foreign = {name: name[len(root) :] for name in weights if name.startswith((f"{root}head.", f"{root}neck."))}
    foreign |= {n: f"backbone.{n[len(prefix) :]}" for n in weights if n.startswith(prefix) and n not in foreign}
    probe = "neck.bn.running_mean" in foreign.values()
    heads = [pair for pair in MMPRETRAIN_HEADS if (pair[1] == "head.1") == probe]
    own = {name: rename(short, (*MMPRETRAIN, *heads)) for name, short in foreign.items()}
    state = {ours: tensor for name, tensor in weights.items() if (ours := own.get(name))}
    return state, [name for name in weights if not own.get(name) and not name.endswith(INERT)]


def to_mmpretrain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under mmpretrain's names, as far as it has them."""
    if "head.1.weight" in state:
        heads = MMPRETRAIN_HEADS[2:]
    else:
        heads = MMPRETRAIN_HEADS[1:2] if "fc_norm.weight" in state else MMPRETRAIN_HEADS[:1]
    pairs = [(own, foreign) for foreign, own in (*MMPRETRAIN, *heads)]
    return {foreign: tensor for name, tensor in state.items() if (foreign := rename(name, pairs))}
