"""Whether a network of ours computes what the encoder of a file computes: by names, and by what leaves no name.

Most of it has a name: layer scale, registers, norms of queries and keys, tables of bias. The activation, the epsilon of
the norms and the number of heads leave no tensor; timm's config.json, where it lies beside the file, has them.
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

#: What an encoder of ours consists of.
ENCODER = ("cls_token", "pos_embed", "patch_embed", "blocks", "norm")
#: First parts of names that no encoder computes with: heads, decoders, projections, the token of masked patches, the
#: blur of SemAIM's targets.
APART = re.compile(
    r"head|head_dist|lm_head|fc_norm|pre_logits|mask_token|masked_embed|decoder(_\w+)?|query_blocks|prediction_head"
    r"|predictor|projector|projection_head|gaussian_blur"
)
#: Parts of the dense backbones' blocks, under names that other families use for more (BEiT, EVA).
DENSE = ("rel_bias", "gamma_1", "gamma_2")
#: Modules of timm's plain ViT that computes as ours does.
PLAIN = (
    VisionTransformer, Block, Attention, Mlp, PatchEmbed, LayerNorm, nn.LayerNorm, nn.Linear, nn.Conv2d, nn.GELU,
    nn.Identity, nn.Sequential, nn.Dropout, DropPath, PatchDropout,
)  # fmt: skip
NORMS = re.compile(r"norm|blocks\.\d+\.norm[12]")  #: the places of its norms


def kinds(names: Iterable[str]) -> str:
    """Names without the numbers of their blocks, with counts."""
    counts = Counter(re.sub(r"\.\d+(?=\.)", ".*", name) for name in names)
    return ", ".join(f"{kind} ({count})" if count > 1 else kind for kind, count in counts.items())


def unread(names: Iterable[str], own: Collection[str], pooled: bool, native: bool) -> list[str]:
    """Tensors that the encoder of a file computes with, and a network does not.

    Args:
        names: of the file's encoder and what stands beside it, under our names.
        own: names of the network.
        pooled: its tokens are pooled to one vector: then a pooling by attention is missed.
        native: this suite trained the file, so what stands beside its encoder is its decoder or head.
    """
    left = []
    for name in names:
        first, last = name.partition(".")[0], name.rpartition(".")[2]
        if name in own:
            if last in DENSE and not native:
                left.append(name)
            continue
        apart = APART.fullmatch(first) or native and first not in ENCODER
        # The final norm and the class token may have no reader: maps have neither, pooled patches no norm.
        apart = apart or first == "attn_pool" and not pooled
        apart = apart or first in ("norm", "cls_token") and not any(n.partition(".")[0] == first for n in own)
        if not apart:
            left.append(name)
    return left


def lacking(missing: Iterable[str]) -> list[str]:
    """Of a network's tensors that no file gave, those of its encoder."""
    return [name for name in missing if name.partition(".")[0] in ENCODER]


def timm_model(recorded: Mapping[str, Any]) -> nn.Module | str:
    """The network that timm's config.json describes, on the meta device; or what keeps it from being built."""
    architecture, args = recorded["architecture"], recorded.get("model_args") or {}
    if not timm.is_model(architecture):
        return f"its config names the architecture {architecture!r}, which timm {timm.__version__} does not have"
    # Arguments of create_model itself would read other files.
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
    """What timm's network computes otherwise than ours, in words.

    Args:
        recorded: timm's network, on any device.
        sizes: of the file's encoder, see `sizes.sizes_of`; a config of other sizes is a difference.
        reads_norm: the final norm takes part.
    """
    depth = len(getattr(recorded, "blocks", ()))
    if (getattr(recorded, "embed_dim", None), depth) != (sizes["embed_dim"], sizes["depth"]):
        return [f"the config beside it is of a network of width {getattr(recorded, 'embed_dim', None)}, depth {depth}"]
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
