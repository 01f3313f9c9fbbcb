"""Whether one of our networks computes the same as the encoder of a file.

Most differences show in the names of tensors: layer scale, registers, norms of queries and keys, bias tables. The
activation, the epsilon of the norms and the number of heads do not; timm's config.json next to the file has them.
"""

import inspect
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import timm
import torch
from timm.layers import Attention, DropPath, LayerNorm, Mlp, PatchDropout, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from semaim.models.vit import LAYER_NORM_EPS

#: Parts of our encoders.
ENCODER = ("cls_token", "pos_embed", "patch_embed", "blocks", "norm")
#: First parts of the names of tensors that no encoder computes with: heads, decoders, projections, the mask token, the
#: blur of SemAIM's targets.
APART = re.compile(
    r"head|head_dist|lm_head|fc_norm|pre_logits|mask_token|masked_embed|decoder(_\w+)?|query_blocks|prediction_head"
    r"|predictor|projector|projection_head|gaussian_blur"
)
#: Parts of the dense backbones' blocks, whose names other families (BEiT, EVA) use for other things too.
DENSE = ("rel_bias", "gamma_1", "gamma_2")
#: Modules of timm's plain ViTs that compute the same as ours.
PLAIN = (
    VisionTransformer, Block, Attention, Mlp, PatchEmbed, LayerNorm, nn.LayerNorm, nn.Linear, nn.Conv2d, nn.GELU,
    nn.Identity, nn.Sequential, nn.Dropout, DropPath, PatchDropout,
)  # fmt: skip
NORMS = re.compile(r"norm|blocks\.\d+\.norm[12]")  #: names of its norms


def kinds(names: Iterable[str]) -> str:
    """Names without block numbers, with counts."""
    counts = Counter(re.sub(r"\.\d+(?=\.)", ".*", name) for name in names)
    return ", ".join(f"{kind} ({count})" if count > 1 else kind for kind, count in counts.items())


def unread(names: Iterable[str], own: Collection[str], pooled: bool, native: bool) -> list[str]:
    """Tensors that the encoder of a file computes with and a network does not.

    Args:
        names: of the tensors read from the file, under our names.
        own: names of the network.
        pooled: the network pools its tokens to one vector, so the file's attention pooling counts as unread.
        native: this suite trained the file, so tensors besides its encoder's belong to its decoder or head.
    """
    left = []
    for name in names:
        first, last = name.partition(".")[0], name.rpartition(".")[2]
        if name in own:
            if last in DENSE and not native:
                left.append(name)
            continue
        apart = APART.fullmatch(first) or native and first not in ENCODER
        # The final norm and the class token may be unused: maps need neither, pooled patches need no norm.
        apart = apart or first == "attn_pool" and not pooled
        apart = apart or first in ("norm", "cls_token") and not any(n.partition(".")[0] == first for n in own)
        if not apart:
            left.append(name)
    return left


def lacking(missing: Iterable[str]) -> list[str]:
    """Those of a network's missing tensors that belong to its encoder."""
    return [name for name in missing if name.partition(".")[0] in ENCODER]


def timm_model(recorded: Mapping[str, Any]) -> nn.Module | str:
    """The network that timm's config.json describes, on the meta device, or why it cannot be built."""
    architecture, args = recorded["architecture"], recorded.get("model_args") or {}
    if not timm.is_model(architecture):
        return f"its config names the architecture {architecture!r}, which timm {timm.__version__} does not have"
    # create_model's own arguments could make it read other files.
    reserved = set(inspect.signature(timm.create_model).parameters) & set(args)
    try:
        if reserved:
            raise ValueError(f"model_args names {', '.join(sorted(reserved))}")
        with torch.device("meta"):  # takes no memory
            return timm.create_model(architecture, pretrained=False, **args)
    except Exception as error:  # of any type: the arguments are data
        reason = " ".join(str(error).split())[:150]
        return f"its config names the architecture {architecture}, which timm cannot build ({reason})"


def recorded_differences(recorded: nn.Module, sizes: Mapping, reads_norm: bool) -> list[str]:
    """How timm's network differs from ours, in words.

    Args:
        recorded: timm's network, on any device.
        sizes: of the file's encoder, see `sizes.sizes_of`; a config with other sizes is a difference.
        reads_norm: whether the final norm is used.
    """
    depth = len(getattr(recorded, "blocks", ()))
    if (getattr(recorded, "embed_dim", None), depth) != (sizes["embed_dim"], sizes["depth"]):
        return [f"the config next to it is of a network of width {getattr(recorded, 'embed_dim', None)}, depth {depth}"]
    found: dict[str, list[str]] = {}
    for name, module in recorded.named_modules():
        first = name.partition(".")[0]
        if APART.fullmatch(first) or first == "attn_pool" or first == "norm" and not reads_norm:
            continue
        what = None
        if type(module) not in PLAIN or isinstance(module, nn.LayerNorm) and not NORMS.fullmatch(name):
            what = f"is {type(module).__name__}"
        elif isinstance(module, nn.LayerNorm) and module.eps != LAYER_NORM_EPS:
            what = f"has eps {module.eps:g}, ours {LAYER_NORM_EPS:g}"
        elif isinstance(module, nn.GELU) and module.approximate != "none":
            what = f"is GELU by {module.approximate}"
        elif isinstance(module, Attention) and not math.isclose(module.scale, module.head_dim**-0.5):
            what = f"scales by {module.scale:g}"
        if what:
            found.setdefault(what, []).append(name or "network")
    return [f"{kinds(names)} {what}" for what, names in found.items()]


def heads_of(recorded: nn.Module) -> int | None:
    """The number of heads of timm's network."""
    heads = {module.num_heads for name, module in recorded.named_modules() if name.endswith(".attn")}
    return heads.pop() if len(heads) == 1 else None
