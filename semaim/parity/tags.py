"""The plain ViTs that timm has weights for: whether each consumer loads such a file, and whether the result is right.

For every tag timm's network is built on the meta device; its names and shapes stand for the file. A consumer that loads
it is tested numerically: a network with one of its blocks gets random weights, and ours, loaded from them through the
same code, has to give timm's tokens. This test depends on no name or table of the loader.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import get_pretrained_cfg, list_models
from torch import Tensor, nn

from semaim import checkpoints
from semaim.checkpoints.consumers import NEW_IN_BACKBONES, NEW_IN_CLASSIFIERS
from semaim.errors import UserError
from semaim.models.classifier import Classifier
from semaim.models.segvit import SegmentationViT
from semaim.models.vitdet import ViTDet

TimmNetwork = Any  #: one of timm's ViTs, whose classes declare different attributes
#: timm's modules of plain ViTs.
MODULES = ("vision_transformer", "deit", "beit", "eva")
#: Right means equal up to rounding in float64: an epsilon of 1e-5 for 1e-6 changes tokens of variance 1 by 4.5e-6.
TOLERANCE = 1e-9
SIDE = 3  #: of the grid whose tokens are compared


@dataclass(frozen=True)
class Verdict:
    """The result of one consumer with a tag's file."""

    tags: tuple[str, ...]
    config: bool  #: timm's config.json is next to the file
    consumer: str
    refusal: str | None  #: None if it loads
    error: float | None = None  #: largest difference of the features, if it loads and was computed

    @property
    def word(self) -> str:
        """right, refused or WRONG; loads, if nothing was computed."""
        if self.refusal is not None:
            return "refused"
        if self.error is None:
            return "loads"
        return "right" if self.error <= TOLERANCE else "WRONG"


def plain_tags() -> list[str]:
    """All pretrained tags of timm's plain ViTs."""
    return [tag for module in MODULES for tag in list_models(pretrained=True, module=module)]


def architectures(tags: Iterable[str]) -> list[tuple[str, ...]]:
    """Tags in groups of one architecture and image size, whose files differ only in their head and values."""
    groups: dict[tuple, list[str]] = {}
    for tag in tags:
        groups.setdefault((tag.partition(".")[0], _input_size(tag)), []).append(tag)
    return [tuple(group) for group in groups.values()]


def _input_size(tag: str) -> tuple[int, ...]:
    cfg = get_pretrained_cfg(tag)
    if cfg is None:
        raise UserError(f"timm knows no tag {tag}")
    return cfg.input_size


# Networks as a user's config for this encoder builds them, and the same features from timm.


def _class_token(theirs: TimmNetwork, images: Tensor) -> Tensor:
    return theirs.forward_features(images)[:, 0]


def _unnormed(theirs: TimmNetwork, images: Tensor) -> Tensor:
    theirs.norm = nn.Identity()
    return theirs.forward_features(images)[:, theirs.num_prefix_tokens :]


def _mean(theirs: TimmNetwork, images: Tensor) -> Tensor:
    return _unnormed(theirs, images).mean(dim=1)


def _own_norm(theirs: TimmNetwork, images: Tensor) -> Tensor:
    pooled = _mean(theirs, images)
    if isinstance(theirs.fc_norm, nn.LayerNorm):
        return theirs.fc_norm(pooled)
    return F.layer_norm(pooled, (theirs.embed_dim,), eps=1e-6)  # a new one


def _without_class_token(theirs: TimmNetwork, images: Tensor) -> Tensor:
    if theirs.cls_token is not None:
        theirs.cls_token = None
        theirs.num_prefix_tokens -= 1
        if theirs.pos_embed is not None:
            theirs.pos_embed = nn.Parameter(theirs.pos_embed[:, -(SIDE**2) :].detach())
    return _unnormed(theirs, images)


def _map(ours: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    found = ours(images)
    return (found if torch.is_tensor(found) else found[-1]).flatten(2).transpose(1, 2)


def _vitdet(**sizes) -> ViTDet:
    depth = sizes["depth"]  # every block global: timm has no windows
    return ViTDet(pretrain_img_size=sizes["img_size"], global_blocks=tuple(range(depth)), **sizes)


def _segmentor(**sizes) -> SegmentationViT:
    return SegmentationViT(layer_scale=1.0, out_blocks=(sizes["depth"] - 1,), **sizes)


@dataclass(frozen=True)
class Use:
    """A consumer: its network, its new parameters, its features, and the same features by timm."""

    build: Callable[..., nn.Module]
    new: tuple[str, ...]
    ours: Callable[[Any, Tensor], Tensor]
    theirs: Callable[[TimmNetwork, Tensor], Tensor]


def _features(ours: Classifier, images: Tensor) -> Tensor:
    return ours.features(images)


USES = {
    "k-NN": Use(lambda **s: Classifier(0, "cls", probe=True, **s), NEW_IN_CLASSIFIERS, _features, _class_token),
    "mean": Use(lambda **s: Classifier(0, "avg", probe=True, **s), NEW_IN_CLASSIFIERS, _features, _mean),
    "fine-tuning": Use(lambda **s: Classifier(5, "avg", **s), NEW_IN_CLASSIFIERS, _features, _own_norm),
    "detection": Use(_vitdet, NEW_IN_BACKBONES, _map, _without_class_token),
    "segmentation": Use(_segmentor, NEW_IN_BACKBONES, _map, _unnormed),
}


def sizes_in(theirs: TimmNetwork) -> dict:
    """The sizes that a user who knows the architecture sets in the config."""
    block, patch = theirs.blocks[0], theirs.patch_embed.patch_size
    hidden = getattr(getattr(getattr(block, "mlp", None), "fc1", None), "out_features", 4 * theirs.embed_dim)
    return {
        "embed_dim": theirs.embed_dim,
        "depth": len(theirs.blocks),
        "num_heads": getattr(getattr(block, "attn", None), "num_heads", 1),
        "patch_size": tuple(patch),
        "mlp_ratio": hidden / theirs.embed_dim,
    }


def file_of(theirs: TimmNetwork, tag: str, config: bool, args: dict) -> checkpoints.Checkpoint:
    """What `checkpoints.read` finds in timm's file of a network, with or without config.json."""
    described = {"architecture": tag.partition(".")[0], "model_args": args} if config else None
    return checkpoints.recognise(Path(f"{tag}.safetensors"), theirs.state_dict(), described)


def build(tag: str, **args) -> TimmNetwork:
    """timm's network of a tag on the meta device, which takes no memory."""
    with torch.device("meta"):
        try:
            return timm.create_model(tag, pretrained=False, weight_init="skip", **args)
        except TypeError:  # not all of timm's networks have this argument
            return timm.create_model(tag, pretrained=False, **args)


def judge(tags: tuple[str, ...], depth: int | None = None, compute: bool = True) -> Iterator[Verdict]:
    """The verdicts of all consumers on one architecture, without and with its config.json.

    Args:
        tags: of the architecture.
        depth: build this many blocks instead of all, if timm supports it.
        compute: compare numbers if a file loads.
    """
    tag = tags[0]
    args: dict[str, Any] = {"depth": depth} if depth else {}
    try:
        theirs = build(tag, **args)
    except AssertionError:  # it has settings per block
        theirs, args = build(tag), {}
    patch, grid = theirs.patch_embed.patch_size, theirs.patch_embed.grid_size
    image = tuple(n * side for n, side in zip(grid, patch, strict=True))
    with torch.device("meta"):
        ours = {name: use.build(img_size=image, **sizes_in(theirs)) for name, use in USES.items()}
    errors: dict[str, float] = {}
    for config in (False, True):
        found, unreadable = None, None
        try:
            found = file_of(theirs, tag, config, args)
        except UserError as error:
            unreadable = str(error)
        for name, use in USES.items():
            refusal = refused(ours[name], found, use.new) if found else unreadable
            if refusal is None and compute and name not in errors:
                errors[name] = difference(use, tag)
            yield Verdict(tags, config, name, refusal, None if refusal else errors.get(name))


def refused(ours: nn.Module, found: checkpoints.Checkpoint, new: tuple[str, ...]) -> str | None:
    """Why a network on the meta device refuses a file; None if it does not."""
    try:
        with torch.device("meta"):
            checkpoints.fit(ours, found, new)
    except UserError as error:
        return str(error)
    return None


@torch.no_grad()
def difference(use: Use, tag: str) -> float:
    """The largest difference between our and timm's features of two images, in a network of one random block."""
    image = tuple(SIDE * side for side in build(tag, depth=1).patch_embed.patch_size)
    args: dict[str, Any] = {"depth": 1, "img_size": image, "num_classes": 0}
    theirs: TimmNetwork = timm.create_model(tag, pretrained=False, **args).double().eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in theirs.named_parameters():  # fp32 values, as in files
        noise = torch.randn(parameter.shape, generator=generator) * 0.05
        parameter.copy_(noise + ("norm" in name and name.endswith("weight")))
    ours = use.build(img_size=image, **sizes_in(theirs)).double().eval()
    _, state = checkpoints.fit(ours, file_of(theirs, tag, True, args), use.new, partial=True)
    ours.load_state_dict(state, strict=False)
    images = torch.randn(2, 3, *image, generator=generator).double()
    return (use.ours(ours, images) - use.theirs(theirs, images)).abs().max().item()
