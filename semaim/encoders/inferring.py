"""Which of timm's plain ViTs a file of weights is, from the names and shapes of its tensors alone.

Shapes do not show everything: the number of heads, the activation, the epsilon of the norms, the pooling and the
settings of RoPE are in no tensor. Where the architectures that have a file's tensors differ in one of them, the answer
is the list of those architectures and what they differ in, and never one of them.

timm's registry names what its entrypoints build (https://github.com/huggingface/pytorch-image-models, timm/models).
"""

import functools
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import timm
import torch
from timm.layers import DropPath, PatchDropout
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from semaim.checkpoints.same_network import APART

#: Modules of timm whose networks are plain ViTs.
MODULES = ("vision_transformer", "deit", "beit", "eva")
#: Last parts of the names of position tables, whose size is that of the grid of patches.
TABLES = ("pos_embed", "relative_position_bias_table")
#: Arguments that timm's classes have in common, with the value each of the classes has by default.
DEFAULTS = {
    "embed_dim": 768,
    "depth": 12,
    "patch_size": 16,
    "class_token": True,
    "pos_embed": "learn",
    "use_abs_pos_emb": True,
}
#: Arguments that are no part of what a network computes with its encoder's tensors at a size of images.
ASIDE = ("img_size", "num_classes")
#: Modules that do nothing when a network is evaluated.
IDLE = (nn.Identity, nn.Dropout, DropPath, PatchDropout)
#: Attributes of modules that change nothing in what a network computes from an image of one size when it is evaluated:
#: those of training, of initial weights and of the classifier; how a kernel is chosen; whether other sizes are taken,
#: and what is prepared before `forward` only where they are not.
ATTRIBUTES_ASIDE = frozenset(
    (
        "training distilled_training grad_checkpointing shift_coords jitter_coords rescale_coords aug_active "
        "fix_init weight_init_mode head_init_scale init_values num_classes feature_info fused_attn "
        "img_size dynamic_img_size strict_img_size output_fmt flatten feat_shape _use_cached_embed"
    ).split()
)
#: Attributes that follow from the number of heads.
OF_HEADS = ("scale", "head_dim", "dim", "attn_dim", "num_kv_heads", "kv_repeat")
#: What attributes of modules are, in words.
WORDS = {
    "num_heads": "heads",
    "eps": "epsilon of the norms",
    "global_pool": "pooling",
    "temperature": "RoPE temperature",
    "ref_feat_shape": "RoPE reference grid",
    "rotate_half": "RoPE rotation by halves",
    "grid_indexing": "RoPE order of the axes",
    "grid_offset": "RoPE offset of the grid",
}


@dataclass(frozen=True)
class Inferred:
    """What the tensors of a file say of its architecture.

    Attributes:
        arch: name of the architecture in timm; None if the tensors do not determine it.
        args: further arguments for `timm.create_model`: `img_size`, where it is not the architecture's own.
        candidates: architectures that have these names and shapes, whatever the size of their position tables.
        differ: where there are candidates and no architecture, what they differ in, in words.
    """

    arch: str | None
    args: dict[str, Any]
    candidates: tuple[str, ...]
    differ: str


@dataclass(frozen=True)
class Recipe:
    """What the entrypoint of an architecture passes to a class of timm."""

    network: Callable[..., nn.Module]
    kwargs: dict[str, Any]

    def argument(self, name: str) -> Any:
        """An argument of DEFAULTS."""
        return self.kwargs.get(name, DEFAULTS[name])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the architecture's own images."""
        return pair(self.kwargs.get("img_size", 224))

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of its patches."""
        return pair(self.argument("patch_size"))

    @property
    def outline(self) -> tuple:
        """What is known of its tensors before it is built, as `outline` has it of a file."""
        positions = self.argument("pos_embed") not in ("", "none") and self.argument("use_abs_pos_emb")
        registers = self.kwargs.get("reg_tokens", self.kwargs.get("num_reg_tokens", 0))
        width, depth, class_token = (self.argument(name) for name in ("embed_dim", "depth", "class_token"))
        return width, depth, self.patch, bool(class_token), registers, bool(positions)

    @property
    def computes(self) -> tuple:
        """Equal only for recipes of networks that compute the same at the same size of images."""
        return plain(self.network), plain({name: value for name, value in self.kwargs.items() if name not in ASIDE})

    def build(self, size: tuple[int, int]) -> nn.Module:
        """The network for a size of images, without memory for its tensors."""
        with Unfilled(), torch.device("meta"):
            return self.network(**self.kwargs | {"img_size": size})


class Recorded(Exception):
    """Ends an entrypoint where it would build its network."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe


class Unfilled(TorchFunctionMode):
    """Skips what only changes values in place: tensors on the meta device have none, and its kernels take long."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The changed tensor as it was, or what the function gives."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        tensor = kwargs.get("tensor", args[0] if args else None)
        if name.endswith("_") and not name.endswith("__") and isinstance(tensor, Tensor) and tensor.is_meta:
            return tensor
        return func(*args, **kwargs)


def pair(value: Any) -> tuple[int, int]:
    """Height and width, where one number stands for both."""
    height, width = (value, value) if isinstance(value, int) else value
    return int(height), int(width)


def plain(value: Any) -> Any:
    """A value to compare and to print: functions and classes by full name, mappings and lists as tuples."""
    if isinstance(value, functools.partial):
        return ("partial", plain(value.func), plain(value.args), plain(value.keywords))
    if isinstance(value, Mapping):
        return tuple((name, plain(value[name])) for name in sorted(value))
    if isinstance(value, (list, tuple)):
        return tuple(plain(each) for each in value)
    if callable(value):
        name = getattr(value, "__qualname__", "<")
        # A function made in another has values of its own, which its name does not show; its address does.
        return repr(value) if "<" in name else f"{value.__module__}.{name}"
    return value


@functools.lru_cache(maxsize=1)
def architectures() -> tuple[str, ...]:
    """Names of all plain ViTs of the timm that is installed, in alphabetical order."""
    return tuple(sorted(name for module in MODULES for name in timm.list_models(module=module)))


@functools.lru_cache(maxsize=1)
def tags() -> tuple[str, ...]:
    """Names of all pretrained weights of these architectures, `ARCHITECTURE.TAG`, in alphabetical order."""
    return tuple(sorted(tag for module in MODULES for tag in timm.list_models(module=module, pretrained=True)))


def recording(module: str) -> dict[str, Any]:
    """The names of a module of timm, with copies of its functions that record a network instead of building it.

    Copies leave timm itself as it is, for other threads too. timm's own builder runs in them, because it adds
    arguments from the configuration of the pretrained weights; only the class is replaced.
    """
    names = dict(vars(sys.modules[module]))
    build = names["build_model_with_cfg"]

    def build_recorded(network: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> Any:
        def record(**final: Any) -> Any:
            # The entrypoints of two of the modules take it, the others pass it on.
            final.pop("use_naflex", None)
            raise Recorded(Recipe(network, final))

        return build(record, *args, **kwargs)

    for name, value in list(names.items()):
        if isinstance(value, FunctionType) and value.__module__ == module:
            names[name] = rebound(value, names)
    names["build_model_with_cfg"] = build_recorded
    return names


def rebound(function: FunctionType, names: dict[str, Any]) -> FunctionType:
    """A copy of a function that looks up its global names elsewhere."""
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


@functools.lru_cache(maxsize=1)
def recipes() -> dict[str, Recipe]:
    """What every architecture passes to a class of timm."""
    found = {}
    recorders: dict[str, dict[str, Any]] = {}
    for arch in architectures():
        entrypoint: Any = timm.model_entrypoint(arch)
        if entrypoint.__module__ not in recorders:
            recorders[entrypoint.__module__] = recording(entrypoint.__module__)
        try:
            rebound(entrypoint, recorders[entrypoint.__module__])(use_naflex=False)
        except Recorded as recorded:
            found[arch] = recorded.recipe
        else:
            raise RuntimeError(f"timm {timm.__version__} builds {arch} in a way that is not known here")
    return found


def apart(name: str) -> bool:
    """Whether a tensor is of no encoder, or is a fixed table that timm computes itself and reads from no file."""
    first, last = name.partition(".")[0], name.rpartition(".")[2]
    # timm's loading drops these of older files; the frequencies are learnt, where a network has them as a tensor.
    fixed = last == "relative_position_index" or (first == "rope" and last != "freqs")
    # The norm after the pooling is another architecture's than the norm before it.
    return fixed or (first != "fc_norm" and APART.fullmatch(first) is not None)


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of the encoder's tensors."""
    return {name: tuple(tensor.shape) for name, tensor in state.items() if not apart(name)}


def is_table(name: str) -> bool:
    """Whether a tensor is a position table."""
    return name.rpartition(".")[2] in TABLES


def sizeless(layout: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes without what a position table's grid decides: the tokens of a table, the places of a table of biases."""
    found = dict(layout)
    for name, shape in layout.items():
        if is_table(name):
            found[name] = (-1, *shape[1:]) if name.endswith(TABLES[1]) else (*shape[:1], -1, *shape[2:])
    return found


@functools.lru_cache(maxsize=1024)
def layout(arch: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the encoder's tensors of an architecture."""
    recipe = recipes()[arch]
    return shapes(recipe.build(recipe.size).state_dict())


def outline(found: Mapping[str, tuple[int, ...]]) -> tuple:
    """Width, depth, size of the patches, class token, registers and position table of an encoder's tensors."""
    patch = found.get("patch_embed.proj.weight", ())
    blocks = {match[1] for name in found if (match := re.match(r"blocks\.(\d+)\.", name))}
    registers = found["reg_token"][1] if len(found.get("reg_token", ())) == 3 else 0
    return next(iter(patch), 0), len(blocks), patch[2:], "cls_token" in found, registers, "pos_embed" in found


def fitting(found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Architectures that have an encoder's tensors, whatever the size of its position tables."""
    seen = outline(found)
    wanted = sizeless(found)
    same: dict[Any, bool] = {}
    fit = []
    for arch, recipe in recipes().items():
        if recipe.outline != seen:
            continue
        # Architectures of one recipe have one layout: only one of them is built.
        if recipe.computes not in same:
            same[recipe.computes] = sizeless(layout(arch)) == wanted
        if same[recipe.computes]:
            fit.append(arch)
    return fit


def image_size(arch: str, found: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
    """Size of images for which an architecture has the position tables of an encoder.

    A table shows how many patches there are, not how they lie. The size is the architecture's own where that fits or
    where it has no table, else that of a square grid; None where neither fits.
    """
    recipe = recipes()[arch]
    own = layout(arch)
    tables = [name for name in own if is_table(name)]
    if all(own[name] == found[name] for name in tables):
        return recipe.size
    if "pos_embed" in tables:
        rows, columns = (length // side for length, side in zip(recipe.size, recipe.patch, strict=True))
        prefix = own["pos_embed"][1] - rows * columns
        side = math.isqrt(max(found["pos_embed"][1] - prefix, 0))
    else:  # (2 rows - 1) (2 columns - 1) distances between patches, and three with the class token
        side = (math.isqrt(max(found[tables[0]][0] - 3, 0)) + 1) // 2
    if side == 0:
        return None
    size = (side * recipe.patch[0], side * recipe.patch[1])
    at_size = shapes(recipe.build(size).state_dict())
    return size if all(at_size[name] == found[name] for name in tables) else None


def fingerprint(network: nn.Module) -> dict[tuple[str, str], Any]:
    """What a network computes beside its tensors: the kind of every module, and their plain attributes."""
    bare = vars(nn.Module())
    found: dict[tuple[str, str], Any] = {}
    for name, module in network.named_modules():
        if isinstance(module, IDLE) or name.partition(".")[0] in ("head", "head_dist"):
            continue
        found[name, "type"] = plain(type(module))
        for attribute, value in vars(module).items():
            if attribute not in bare and attribute not in ATTRIBUTES_ASIDE and not isinstance(value, Tensor):
                found[name, attribute] = plain(value)
    return found


def differences(prints: Iterable[Mapping[tuple[str, str], Any]]) -> str:
    """What networks differ in, in words, with the values."""
    prints = list(prints)
    keys = sorted({key for each in prints for key in each}, key=str)
    differing = [key for key in keys if len({repr(each.get(key)) for each in prints}) > 1]
    heads = any(attribute == "num_heads" for _, attribute in differing)
    kinds = {name for name, attribute in differing if attribute == "type"}
    words: dict[str, set[str]] = {}
    for name, attribute in differing:
        if (heads and attribute in OF_HEADS) or (name in kinds and attribute != "type"):
            continue
        last = name.rpartition(".")[2]
        if attribute == "type":
            word = "activation" if last in ("act", "act1", "act2") else f"kind of {last or 'network'}"
        else:
            word = WORDS.get(attribute, f"{attribute} of {last or 'network'}")
        words.setdefault(word, set()).update(str(each[name, attribute]) for each in prints if (name, attribute) in each)
    described = [f"{word} ({', '.join(shortened(values))})" for word, values in sorted(words.items())]
    return ", ".join(described) or "settings that no tensor shows"


def shortened(values: Iterable[str]) -> list[str]:
    """Values in order, with classes by their last names where these tell them apart."""
    full = sorted(values)
    short = sorted(value.rpartition(".")[2] if re.match(r"[a-z_]\w*\.", value) else value for value in full)
    return short if len(set(short)) == len(full) else full


def infer(state: Mapping[str, Tensor]) -> Inferred:
    """The architecture of a file's weights in timm's names, as far as its tensors determine it.

    Tensors of no encoder, such as heads and the mask token, decide nothing, and are the caller's to look at.

    Args:
        state: tensors by name; only their shapes are looked at.
    """
    found = shapes(state)
    candidates = tuple(fitting(found))
    sizes = {arch: size for arch in candidates if (size := image_size(arch, found)) is not None}
    if not candidates:
        return Inferred(None, {}, (), "")
    if not sizes:
        return Inferred(None, {}, candidates, "image size (the position tables are of no square grid)")
    candidates = tuple(sizes)
    with_table = any(is_table(name) for name in found)
    if len({recipes()[arch].computes for arch in candidates}) > 1:
        # Networks of one size of images have the same values where these follow from it.
        common = sizes[candidates[0]]
        prints = {
            arch: fingerprint(recipes()[arch].build(sizes[arch] if with_table else common)) for arch in candidates
        }
        first = prints[candidates[0]]
        if any(each != first for each in prints.values()):
            return Inferred(None, {}, candidates, differences(prints.values()))
    arch = next((arch for arch in candidates if sizes[arch] == recipes()[arch].size), candidates[0])
    height, width = sizes[arch]
    own = (height, width) == recipes()[arch].size
    return Inferred(arch, {} if own else {"img_size": height if height == width else (height, width)}, candidates, "")
