"""Sizes of an encoder, read from the shapes of its weights: width, depth, heads, patches, image size."""

import math
import re
from collections.abc import Mapping

from timm.layers import to_2tuple
from torch import Tensor

from semaim.models.vit import SIZES


def sizes_of(state: Mapping[str, Tensor], network: Mapping | None = None) -> dict:
    """embed_dim, depth, num_heads, patch_size, img_size (height, width) and mlp_ratio of an encoder's weights.

    The weights do not show the number of heads. It is taken from `network`, the network config in a semaim checkpoint,
    else from the published model of that width and depth; else heads are assumed to be 64 channels wide.
    """
    width, _, *patch = state["patch_embed.proj.weight"].shape
    depth = 1 + max(int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name)))
    preset = (network and network.get("size", "base")) or preset_of({"embed_dim": width, "depth": depth})
    heads = (network or {}).get("num_heads") or (SIZES[preset]["num_heads"] if preset in SIZES else max(1, width // 64))
    img_size = None
    if network and network.get("img_size"):
        img_size = to_2tuple(network["img_size"])
    elif "pos_embed" in state:
        side = math.isqrt(state["pos_embed"].shape[1])  # with or without the class token's row
        img_size = (side * patch[0], side * patch[1])
    return {
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "patch_size": tuple(patch),
        "img_size": img_size,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
    }


def preset_of(sizes: Mapping) -> str | None:
    """The published model of this width and depth, a name of `vit.SIZES`; None if there is none."""
    wanted = sizes["embed_dim"], sizes["depth"]
    return next((name for name, size in SIZES.items() if (size["embed_dim"], size["depth"]) == wanted), None)


def grid_of(sizes: Mapping) -> tuple[int, int]:
    """(rows, columns) of patches of the position table."""
    return tuple(size // patch for size, patch in zip(sizes["img_size"], sizes["patch_size"], strict=True))


def describe(sizes: Mapping) -> str:
    """Sizes in words."""
    name = preset_of(sizes)
    patch = "x".join(map(str, dict.fromkeys(sizes["patch_size"])))
    text = f"ViT{'-' + name if name else ''} of width {sizes['embed_dim']}, depth {sizes['depth']}, patch {patch}"
    text += f", MLP ratio {sizes['mlp_ratio']:g}" if sizes["mlp_ratio"] != 4 else ""
    return text + (f", {'x'.join(map(str, dict.fromkeys(sizes['img_size'])))} px" if sizes["img_size"] else "")
