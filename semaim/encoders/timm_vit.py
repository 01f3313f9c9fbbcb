"""timm's plain ViTs as an `Encoder`, by timm's own code: building, filtering of weights, positions, blocks, pooling.

Plain means the classes of timm's vision_transformer, deit, beit and eva modules: one sequence of tokens of one width
throughout. What timm cannot do per image size (tables of relative positions) is done by a resized copy.
"""

import copy
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from threading import Lock
from typing import Any, ClassVar, NamedTuple

import timm
import torch
from timm.layers import to_2tuple
from timm.models import model_entrypoint
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from semaim.checkpoints import LoadReport
from semaim.checkpoints.same_network import APART, kinds
from semaim.encoders.contract import FAMILIES, Encoder, Source, build
from semaim.errors import UserError

#: timm's modules of plain ViTs.
MODULES = ("vision_transformer", "deit", "beit", "eva")
#: First parts of names of tensors that no encoder of timm's computes with.
HEADS = frozenset({"head", "head_dist", "lm_head", "pre_logits", "mask_token"})
#: Arguments that the tasks set, or with which timm would read other files or build another kind of network.
RESERVED = {
    *inspect.signature(timm.create_model).parameters, "features_only", "num_classes", "dynamic_img_size", "use_naflex",
    "pretrained_strict", "pretrained_filter_fn", "drop_path_rate", "img_size", "patch_size", "device", "dtype",
}  # fmt: skip
_LOCK = Lock()


class Entry(NamedTuple):
    """What timm builds an architecture from: its class, its filter of foreign weights, its arguments."""

    kind: type[nn.Module]
    filter: Callable[..., dict] | None
    arguments: dict[str, Any]


def architectures() -> list[str]:
    """Names of timm's plain ViTs."""
    return [name for module in MODULES for name in timm.list_models(module=module)]


def in_modules(arch: str, modules: Sequence[str]) -> bool:
    """Whether an architecture is timm's, and belongs to one of these of its modules."""
    return timm.is_model(arch) and model_entrypoint(arch).__module__.rpartition(".")[2] in modules


@cache
def entry(arch: str, modules: tuple[str, ...] = MODULES) -> Entry:
    """timm's entry of an architecture of these modules, recorded from its function without building the network."""
    if not in_modules(arch, modules):
        raise UserError(f"{arch} is no architecture of timm's {', '.join(modules)}")
    function = model_entrypoint(arch)
    module: Any = sys.modules[function.__module__]
    found: list[Entry] = []

    def record(kind: type[nn.Module], variant: str, pretrained: bool, **arguments: Any) -> nn.Module:
        found.append(Entry(kind, arguments.pop("pretrained_filter_fn", None), arguments))
        return nn.Identity()

    with _LOCK:  # the function looks its builder up in its module
        builder, module.build_model_with_cfg = module.build_model_with_cfg, record
        try:
            function(pretrained=False)
        finally:
            module.build_model_with_cfg = builder
    return found[0]


def takes(kind: type[nn.Module], name: str) -> bool:
    """Whether a class of timm's, or the one that it passes its arguments to, has an argument."""
    return any(name in inspect.signature(base.__init__).parameters for base in inspect.getmro(kind)[:-1])  # type: ignore[misc]


class OfTimm(Encoder):
    """What encoders on timm's networks share.

    Attributes:
        vit: timm's network, without its classifier; its classes declare different attributes.
        arch: its name.
        shapes: of all its tensors as built, also of those that `keep_for_maps` and `keep_for_pool` remove.
        timm_modules: those of timm's whose architectures belong to the family.
    """

    vit: Any
    arch: str
    shapes: dict[str, torch.Size]
    timm_modules: ClassVar[tuple[str, ...]]

    @classmethod
    def knows(cls, arch: str) -> bool:
        """See `Encoder.knows`."""
        return in_modules(arch, cls.timm_modules)

    @classmethod
    def own_size(cls, arch: str) -> tuple[int, int]:
        """See `Encoder.own_size`."""
        return default_size(arch)

    @property
    def blocks(self) -> Any:
        """timm's blocks."""
        return self.vit.blocks

    @property
    def title(self) -> str:
        """timm's name of the architecture."""
        return self.arch

    @cached_property
    def layers(self) -> dict[str, int]:
        """The layer of every parameter by timm's `group_matcher`: 0 is the embedding."""
        return dict(group_with_matcher(self.vit.named_parameters(), self.vit.group_matcher(coarse=False), reverse=True))

    def get_layer_depth(self, name: str) -> tuple[int, int]:
        """See `Encoder.get_layer_depth`."""
        last = max(self.layers.values()) + 1
        return self.layers.get(name.removeprefix("vit."), last), last + 1

    def no_weight_decay(self) -> set[str]:
        """timm's list."""
        return {f"vit.{name}" for name in self.vit.no_weight_decay()}

    def compare(
        self, state: Mapping[str, Tensor], needed: Sequence[str], source: Source
    ) -> tuple[list[str], list[str]]:
        """The tensors of `vit` that `state` has, and those of `state` that it lacks: heads and the like.

        Raises:
            UserError: one of `needed` is missing, one that encoders compute with is not read, or a shape differs.
        """
        own = self.vit.state_dict()
        missing = [name for name in needed if name not in state]
        extra = [name for name in state if name not in self.shapes]
        unread = [name for name in extra if not is_apart(name)]
        matched = [name for name in own if name in state]
        wrong = [name for name in matched if state[name].shape != own[name].shape]
        if missing or unread or wrong:
            reasons = [f"it lacks {kinds(missing)}"] if missing else []
            reasons += [f"it holds {kinds(unread)}, which that architecture does not read"] if unread else []
            reasons += [f"{n} is {tuple(state[n].shape)}, not {tuple(own[n].shape)}" for n in wrong[:3]]
            raise UserError(f"{source.name} is no {self.arch}: {'; '.join(reasons)} (another --arch?)")
        return matched, extra

    def fill(self, state: Mapping[str, Tensor], matched: Sequence[str]) -> None:
        """Load these tensors, except on the meta device."""
        if not self.vit.patch_embed.proj.weight.is_meta:
            self.vit.load_state_dict({name: state[name] for name in matched}, strict=True)


@FAMILIES.register_module(name="timm")
class TimmEncoder(OfTimm):
    """One of timm's plain ViTs, without its classifier.

    Args:
        arch: timm's name of the architecture.
        args: further arguments of timm's network, such as embed_dim; and norm_eps, the epsilon of all norms.
        img_size: side or (height, width) in pixels of the position tables; None for the architecture's own. Other
            images are possible: tables are then resampled as timm does (bicubic, antialiased).
        patch_size: side of a patch in pixels; None for the architecture's own. For another size `load` resamples the
            patch projection (timm's `resample_patch_embed`).
        drop_path_rate: of the last block, rising linearly from 0 at the first.
        with_cp: recompute activations in the backward pass.
    """

    family = "timm"
    timm_modules = MODULES

    def __init__(
        self,
        arch: str,
        args: Mapping[str, Any] | None = None,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | None = None,
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
    ):
        super().__init__()
        found, args = entry(arch), dict(args or {})
        if reserved := sorted(RESERVED & args.keys()):
            raise UserError(f"arguments of {arch} name {', '.join(reserved)}, which the suite sets itself")
        sizes: dict[str, Any] = {"img_size": img_size and to_2tuple(img_size), "patch_size": patch_size}
        sizes = {name: size for name, size in sizes.items() if size is not None}
        if patch_size and "img_size" not in sizes:  # the same grid of patches
            own_patch = to_2tuple(found.arguments.get("patch_size", 16))
            own = default_size(arch)
            sizes["img_size"] = tuple(n // p * patch_size for n, p in zip(own, own_patch, strict=True))
        dynamic: dict[str, Any] = {"dynamic_img_size": True} if takes(found.kind, "dynamic_img_size") else {}
        given = {name: value for name, value in args.items() if name != "norm_eps"}
        self.vit = timm.create_model(
            arch, pretrained=False, num_classes=0, drop_path_rate=drop_path_rate, **given, **sizes, **dynamic
        )
        if "norm_eps" in args:
            set_eps(self.vit, args["norm_eps"])
        self.arch, self.args, self.filter = arch, args, found.filter
        self.embed_dim, self.depth = self.vit.embed_dim, len(self.vit.blocks)
        self.num_prefix_tokens = self.vit.num_prefix_tokens
        self.patch_size = to_2tuple(self.vit.patch_embed.patch_size)
        self.img_size = to_2tuple(self.vit.patch_embed.img_size)
        self.dynamic = bool(dynamic)
        self.windowed: set[int] = set()  # blocks whose tables of relative positions are those of a window
        self.description = {"family": self.family, "arch": arch, "args": args, "patch_size": patch_size}
        self.shapes = {name: tensor.shape for name, tensor in self.vit.state_dict().items()}  # also of what is removed
        if with_cp:
            self.vit.set_grad_checkpointing(True)

    @property
    def has_class_token(self) -> bool:
        """See `Encoder.has_class_token`."""
        return getattr(self.vit, "cls_token", None) is not None

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised -> tokens of timm's `forward_features` (B, P + L, D)."""
        self.check_images(images)
        return self.at_size(size_of(images)).vit.forward_features(images)

    def maps(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """See `Encoder.maps`."""
        self.check_images(images)
        vit = self.at_size(size_of(images)).vit
        return vit.forward_intermediates(images, indices=list(blocks), norm=False, intermediates_only=True)

    def normed_maps(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """See `Encoder.normed_maps`; of any blocks."""
        self.check_images(images)
        vit = self.at_size(size_of(images)).vit
        return vit.forward_intermediates(images, indices=list(blocks), norm=True, intermediates_only=True)

    def native(self, tokens: Tensor) -> Tensor:
        """timm's `forward_head(tokens, pre_logits=True)`: SigLIP's attention pooling, CLIP's class token, and so on."""
        if not self.vit.global_pool:
            raise UserError(f"pool=native: {self.arch} has no pooling of its own: choose cls or avg")
        return self.vit.forward_head(tokens, pre_logits=True)

    def at_size(self, size: tuple[int, int]) -> "TimmEncoder":
        """See `Encoder.at_size`; a copy with resized tables if timm cannot resample them in the forward pass."""
        if self.dynamic or size == self.img_size:
            return self
        if torch.is_grad_enabled() and self.training:
            raise UserError(
                f"{self.arch} has tables of relative positions for images of {self.img_size[0]} x {self.img_size[1]}"
                f" pixels and is trained on {size[0]} x {size[1]}: set img_size to that"
            )
        with torch.no_grad(), quiet():
            twin = copy.deepcopy(self)
            twin.vit.set_input_size(img_size=size)
            for index in self.windowed:  # their tables are those of a window, whatever the size of the image
                twin.vit.blocks[index].attn = copy.deepcopy(self.vit.blocks[index].attn)
            twin.img_size = size
        return twin

    def restrict_tables(self, block: int, window: int) -> None:
        """Give a block that attends within windows a table of relative positions of that size, if it has one."""
        if hasattr(attention := self.vit.blocks[block].attn, "set_window_size"):
            with quiet():
                attention.set_window_size((window, window))
            self.windowed.add(block)

    @property
    def table_window(self) -> int | None:
        """Side in patches that its tables of relative positions were made for in pretraining; None without tables."""
        if not any(name.endswith("relative_position_bias_table") for name in self.shapes):
            return None
        own_patch = to_2tuple(entry(self.arch).arguments.get("patch_size", 16))
        return default_size(self.arch)[0] // own_patch[0]

    def keep_for_maps(self) -> None:
        """See `Encoder.keep_for_maps`."""
        self.vit.norm = self.vit.fc_norm = nn.Identity()
        if getattr(self.vit, "attn_pool", None) is not None:
            self.vit.attn_pool = None

    def keep_for_pool(self, pool: str) -> None:
        """See `Encoder.keep_for_pool`."""
        self.check_pool(pool)
        if pool != "native":
            self.vit.fc_norm = nn.Identity()
            if getattr(self.vit, "attn_pool", None) is not None:
                self.vit.attn_pool = None

    def filtered(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors under the names and in the shapes of `vit`, by timm's filter for this architecture."""
        if self.filter is None:
            return dict(state)
        try:
            with quiet():
                return self.filter(dict(state), self.vit)
        except (ValueError, RuntimeError, AssertionError) as error:
            sides = {n: tuple(t.shape) for n, t in state.items() if n.endswith(("pos_embed", "bias_table"))}
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"{self.arch} cannot take tables {sides} of another size: {reason}") from None

    def load(self, source: Source) -> LoadReport:
        """See `Encoder.load`. What a file has besides the encoder (heads, decoders) is left and reported."""
        own = self.vit.state_dict()
        if source.layout == "semaim":  # a run has removed what its task does not read
            state, needed = self._resized(source), [name for name in self.shapes if name in own]
        else:
            state, needed = self.filtered(source.state), list(self.shapes)
        matched, extra = self.compare(state, needed, source)
        # timm's filter for EVA drops what is computed for RoPE without a word.
        dropped = [name for name in source.state if "rope" in name and name not in state]
        report = LoadReport(source.path, source.layout, matched, unexpected=[*source.left, *extra, *dropped])
        for name in matched:
            before = source.state.get(name)
            if before is not None and before.shape != state[name].shape:
                report.resized.append(f"{name} {tuple(before.shape)} -> {tuple(state[name].shape)}")
        self.fill(state, matched)
        return report

    def _resized(self, source: Source) -> dict[str, Tensor]:
        """The tensors of a run of ours, in this encoder's sizes: a table does not show the sides of its grid."""
        own = self.vit.state_dict()
        if self.img_size == source.size and source.description.get("patch_size") in (None, self.patch_size[0]):
            if all(own[name].shape == tensor.shape for name, tensor in source.state.items() if name in own):
                return source.state
        donor = build(source.description, img_size=source.size)
        assert isinstance(donor, TimmEncoder)
        state = donor.vit.state_dict()
        for index in range(donor.depth):  # a detector's windows have tables of their own size
            name = f"blocks.{index}.attn.relative_position_bias_table"
            if name in source.state and source.state[name].shape != state[name].shape:
                donor.restrict_tables(index, (math.isqrt(len(source.state[name]) - 3) + 1) // 2)
        state |= source.state
        donor.vit.load_state_dict({name: state[name] for name in donor.shapes}, strict=True)
        with quiet():
            donor.vit.set_input_size(img_size=self.img_size, patch_size=self.patch_size)
            for index in self.windowed:
                name = f"blocks.{index}.attn.relative_position_bias_table"
                if source.state[name].shape == own[name].shape:
                    donor.blocks[index].attn = copy.deepcopy(self.blocks[index].attn)
                    donor.blocks[index].attn.relative_position_bias_table.data = source.state[name]
                else:
                    donor.blocks[index].attn.set_window_size(self.blocks[index].attn.window_size)
        resized = donor.vit.state_dict()
        return {name: resized[name] if name in resized else tensor for name, tensor in source.state.items()}


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of torch that timm's resizing of tables of relative positions causes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"timm\.layers\.interpolate")
        yield


def set_eps(vit: nn.Module, eps: float) -> None:
    """Set the epsilon of all norms of a network: transformers' ViT has 1e-12, timm's 1e-6."""
    for module in vit.modules():
        if isinstance(getattr(module, "eps", None), float):
            setattr(module, "eps", eps)  # noqa: B010


def is_apart(name: str) -> bool:
    """Whether no encoder computes with a tensor of this name: heads, decoders, mask tokens."""
    first = name.partition(".")[0]
    return first in HEADS or bool(APART.fullmatch(first)) and first not in ("fc_norm", "attn_pool", "norm")


def size_of(images: Tensor) -> tuple[int, int]:
    """(height, width) of a batch of images."""
    return images.shape[-2], images.shape[-1]


def default_size(arch: str) -> tuple[int, int]:
    """(height, width) in pixels of the position tables of an architecture, unless it is built for another size."""
    found = entry(arch, (model_entrypoint(arch).__module__.rpartition(".")[2],))
    cfg = timm.get_pretrained_cfg(arch, allow_unregistered=True)
    fixed = cfg.input_size[-2:] if cfg and cfg.fixed_input_size else 224
    return to_2tuple({"img_size": fixed, **found.arguments}["img_size"])
