"""Whether each consumer is right with every plain ViT that timm has weights for: computed, with no download.

timm's own network of a tag stands for the file: its names and shapes on the meta device, then random values in a
network of one or two blocks. Both go through the code that `timm:TAG` goes through. Each consumer has to give timm's
numbers in float64, and the gradients of all that it trains, or to refuse by a `UserError`; all else is WRONG.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import to_2tuple
from timm.models import get_pretrained_cfg, list_models
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from semaim import checkpoints
from semaim.checkpoints.consumers import NEW_IN_BACKBONES, NEW_IN_CLASSIFIERS
from semaim.encoders.contract import POOLS, Source
from semaim.encoders.images import Preparation, cfg_of
from semaim.encoders.networks import OnEncoder, PlainClassifier, PlainSegmentationViT, PlainViTDet
from semaim.encoders.sources import of_timm
from semaim.encoders.timm_vit import MODULES, entry
from semaim.errors import UserError
from semaim.models.classifier import Classifier
from semaim.models.segvit import SegmentationViT
from semaim.models.vitdet import ViTDet

TimmNetwork = Any  #: one of timm's ViTs, whose classes declare different attributes
Numbers = dict[str, Tensor]  #: what a network computes, by name: outputs, norms of gradients
Pair = tuple[Numbers, Numbers]  #: ours, and timm's
#: Right means equal up to rounding in float64: an epsilon of 1e-5 for 1e-6 changes tokens of variance 1 by 4.5e-6.
TOLERANCE = 1e-9
SIDE = 4  #: of the grid of patches that the position tables of the computed files are made for
OTHER = (5, 3)  #: grid of images of another size
MAP, PATCH = (6, 6), (16, 16)  #: grid and patches of the images of detectors and segmentors
WIDE = 1000  #: networks wider than this are computed with one block, others with two
RANDOM = ("normal_", "uniform_", "erfinv_")  #: functions that fill new weights, which are then read from a file

#: Consumers of any encoder.
CONSUMERS = ("images", *(f"pool {pool}" for pool in POOLS), "fine-tuning", "ViTDet", "UperNet")


@dataclass(frozen=True)
class Verdict:
    """The result of one consumer with a tag's file: right, refused, WRONG, or loads if nothing was computed."""

    tag: str
    consumer: str
    word: str
    reason: str = ""  #: of what is refused or WRONG
    error: float | None = None  #: the largest difference that was computed, see `compare`


def plain_tags() -> list[str]:
    """All pretrained tags of timm's plain ViTs."""
    return [tag for module in MODULES for tag in list_models(pretrained=True, module=module)]


def architectures(tags: Iterable[str]) -> list[tuple[str, ...]]:
    """Tags in groups of one architecture, image size and pooling, whose files differ only in their head and values."""
    groups: dict[tuple, list[str]] = {}
    for tag in tags:
        cfg = get_pretrained_cfg(tag)
        if cfg is None:
            raise UserError(f"timm knows no tag {tag}")
        key = (tag.partition(".")[0], cfg.input_size, cfg.fixed_input_size, cfg.to_dict().get("global_pool"))
        groups.setdefault(key, []).append(tag)
    return [tuple(group) for group in groups.values()]


def judge(
    tags: Sequence[str], compute: bool = True, depth: int | None = None, known: dict | None = None
) -> Iterator[Verdict]:
    """The verdicts of all consumers on the tags of one group of `architectures`.

    Args:
        tags: of the group. The first is computed for all, except for the preparation of images.
        compute: compare numbers where names and shapes fit.
        depth: compare names and shapes in networks of this many blocks; None for all blocks.
        known: verdicts of earlier groups, filled here. Architectures that differ in their image size are computed once.
    """
    tag, known = tags[0], {} if known is None else known
    args = {name: value for name, value in small(tag, depth).items() if name != "img_size"} if depth else {}
    with on_meta():
        theirs: TimmNetwork = timm.create_model(tag, pretrained=False, **args)
    for one in tags:
        yield attempt(one, "images", partial(compare_images, one, theirs))
    found = [*check_names(tag, theirs, args), *check_own(tag, theirs, args)]
    if compute:
        kind, weights_filter, values = entry(tag.partition(".")[0])
        alike = repr((kind, weights_filter, sorted({**values, "img_size": None}.items())))
        if new := [v.consumer for v in found if v.word == "loads" and (alike, v.consumer) not in known]:
            known |= {(alike, one.consumer): one for one in compute_all(tag, new, theirs.embed_dim > WIDE)}
        found = [known[alike, one.consumer] if one.word == "loads" else one for one in found]
    yield from (Verdict(one, v.consumer, v.word, v.reason, v.error) for one in tags for v in found)


def attempt(tag: str, consumer: str, work: Callable[[], tuple[float | None, str]]) -> Verdict:
    """The verdict by what `work` returns, the largest difference and what differs, or by what it raises."""
    try:
        error, cause = work()
    except UserError as refusal:
        return Verdict(tag, consumer, "refused", str(refusal))
    except Exception as failure:  # no answer to a user
        return Verdict(tag, consumer, "WRONG", f"{type(failure).__name__}: {failure}")
    if error is None:
        return Verdict(tag, consumer, "WRONG" if cause else "loads", cause)
    right = error <= TOLERANCE
    return Verdict(tag, consumer, "right" if right else "WRONG", "" if right else cause, error)


# Names, shapes, and images


class Unfilled(TorchFunctionMode):
    """Context in which new tensors get no random values, and on the meta device none at all: building is fast."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, first = getattr(func, "__name__", ""), args[0] if args else None
        if isinstance(first, Tensor) and name.endswith("_") and not name.endswith("__") and name != "requires_grad_":
            if first.is_meta or name in RANDOM:
                return first
        return func(*args, **(kwargs or {}))


@contextmanager
def on_meta() -> Iterator[None]:
    """Networks are built on the meta device, which takes no memory."""
    with torch.device("meta"), Unfilled():
        yield


def small(tag: str, depth: int) -> dict[str, Any]:
    """Arguments for a network of this many blocks, the first and the last ones, with small position tables."""
    found = entry(tag.partition(".")[0]).arguments
    per_block = {k: v for k, v in found.items() if isinstance(v, list | tuple) and len(v) == found.get("depth", 12)}
    args = {name: (values[0], values[-1])[-depth:] for name, values in per_block.items()}
    return {**args, "depth": depth, "img_size": tuple(SIDE * side for side in to_2tuple(found.get("patch_size", 16)))}


def source_of(tag: str, theirs: TimmNetwork, args: dict) -> Source:
    """What `timm:TAG` opens if the file holds the tensors of `theirs`, which was built with `args`."""
    preparation = Preparation.of_cfg(cfg_of(tag), f"timm's for {tag}")
    with on_meta():
        return of_timm(f"timm:{tag}", Path(tag), tag.partition(".")[0], args, preparation, theirs.state_dict())


def compare_images(tag: str, theirs: TimmNetwork) -> tuple[float, str]:
    """The number of values in the preparation of images that are not timm's, and their names."""
    theirs.pretrained_cfg = get_pretrained_cfg(tag).to_dict()  # type: ignore[union-attr]
    wanted, own = resolve_model_data_config(theirs), Preparation.of_cfg(cfg_of(tag), tag)
    if own.statistics is None:
        raise UserError(own.unknown)
    values: dict[str, Any] = {"crop_pct": own.crop_pct, "crop_mode": own.crop_mode, "interpolation": own.interpolation}
    values |= {"input_size": (3, *own.size), "mean": own.statistics.mean, "std": own.statistics.std}
    differ = [name for name in wanted.keys() | values.keys() if values.get(name) != wanted.get(name)]
    return float(len(differ)), ", ".join(differ)


def uses(source: Source) -> dict[str, Callable[[], OnEncoder]]:
    """The networks of the consumers of any encoder, as the plain configs build them."""
    encoder, size = source.description, source.preparation.size
    return {
        **{f"pool {pool}": partial(PlainClassifier, encoder, 0, pool, True, img_size=size) for pool in POOLS},
        "fine-tuning": partial(PlainClassifier, encoder, 5, "avg", img_size=size),
        "ViTDet": partial(PlainViTDet, encoder),
        "UperNet": partial(PlainSegmentationViT, encoder),
    }


def check_names(tag: str, theirs: TimmNetwork, args: dict) -> list[Verdict]:
    """Which consumers load timm's tensors; WRONG if they are not all that timm computes with, or all that ours has."""
    with on_meta():
        bare: TimmNetwork = timm.create_model(tag, pretrained=False, **args, num_classes=0)
    size, wanted = tuple(bare.patch_embed.img_size), set(bare.state_dict())

    @cache
    def opened() -> tuple[Source, set[str]]:
        source = source_of(tag, theirs, args)
        with on_meta():
            return source, wanted ^ set(source.build().load(source).matched)

    def loads(name: str) -> tuple[None, str]:
        source, unread = opened()
        with on_meta():
            encoder = uses(source)[name]().encoder
            encoder.grid_of(encoder.img_size)  # the size of the tag's images, or that of the config
            lost = {name.removeprefix("vit.") for name in encoder.state_dict()} ^ set(encoder.load(source).matched)
        told = f"not loaded: {', '.join(sorted(lost | unread)[:3])}" if lost | unread else ""
        return None, told or ("" if source.size == size else f"tables of {size} are read as those of {source.size}")

    return [attempt(tag, name, partial(loads, name)) for name in CONSUMERS[1:]]


# Numbers


def random_network(tag: str, **args: Any) -> TimmNetwork:
    """timm's network of a tag, with random values in every tensor of its file."""
    with Unfilled():
        theirs: TimmNetwork = timm.create_model(tag, pretrained=False, num_classes=5, **args)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            if tensor.is_floating_point():
                tensor.normal_(std=0.05, generator=generator).add_("norm" in name and name.endswith("weight"))
    return theirs.eval()


def in_float64(network: Any) -> Any:
    """A network with parameters in float64; tables that are computed stay as they are in training, in float32."""
    for parameter in network.parameters():
        parameter.data = parameter.data.double()
    return network


def resized(theirs: TimmNetwork, grid: Sequence[int]) -> TimmNetwork:
    """A copy of timm's network in float64 for another grid of patches."""
    twin, (height, width) = copy.deepcopy(theirs), theirs.patch_embed.patch_size
    with torch.no_grad():
        twin.set_input_size(img_size=(grid[0] * height, grid[1] * width))
    return in_float64(twin)


def loaded_by_timm(tag: str, theirs: TimmNetwork, **args: Any) -> TimmNetwork:
    """A network that timm's own loading makes from the tensors of another one of the tag, perhaps of other sizes."""
    cfg, args = {"state_dict": theirs.state_dict(), "num_classes": 5}, {**args, "num_classes": 5}
    with Unfilled():
        network: TimmNetwork = timm.create_model(tag, pretrained=True, pretrained_cfg_overlay=cfg, **args)
    network.pretrained_cfg = network.default_cfg = {}  # it keeps the tensors
    return network


def read(use: Callable[..., OnEncoder], source: Source) -> Any:
    """A consumer with the file's weights, in float64."""
    with Unfilled():
        network = use(source.description)
    network.encoder.load(source)
    return in_float64(network)


def images_of(grid: Sequence[int], patch: Sequence[int]) -> Tensor:
    """Two random images of a grid of patches."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, grid[0] * patch[0], grid[1] * patch[1], generator=generator).double()


def run(network: nn.Module, images: Tensor, outputs: Callable | None = None, trained: bool = False) -> Numbers:
    """What a network computes from images, by `outputs` or its forward pass; if trained, the norms of gradients too."""
    network.train(trained)
    torch.manual_seed(0)  # some of timm's networks vary positions in training
    with torch.set_grad_enabled(trained):
        found = outputs(network, images) if outputs else network(images)
    found = [found] if isinstance(found, Tensor) else list(found)
    numbers = {f"output {index}": output.detach() for index, output in enumerate(found)}
    if trained:
        loss = sum((one * torch.arange(one.numel()).double().cos().view_as(one)).sum() for one in found)
        inner = network.encoder if isinstance(network, OnEncoder) else network
        named = {name.removeprefix("vit."): p for name, p in inner.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for name, gradient in zip(named, gradients, strict=True):
            numbers[f"gradient of {name}"] = torch.tensor(torch.nan) if gradient is None else gradient.norm()
    return numbers


def compare(found: Iterable[Pair]) -> tuple[float, str]:
    """The largest difference, relative to the largest of timm's values if that exceeds 1, and what differs."""
    worst, cause = 0.0, ""
    for own, theirs in found:
        for name, value in own.items():
            wanted = theirs.get(name)
            if wanted is None or wanted.shape != value.shape:
                return float("inf"), f"{name} is missing or of another shape"
            error = ((value - wanted).abs().max() / wanted.abs().max().clamp(min=1)).nan_to_num(torch.inf).item()
            if error > worst:
                worst, cause = error, f"{name} differs by {error:.1e}"
    return worst, cause


def compute_all(tag: str, consumers: Sequence[str], wide: bool) -> Iterator[Verdict]:
    """Compare the numbers of some consumers with timm's, in a network of two random blocks, or of one if it is wide."""
    args = small(tag, 1 if wide else 2)
    theirs = random_network(tag, **args)
    source = source_of(tag, theirs, args)
    for name in consumers:
        pairs = pairs_of_maps if name in ("ViTDet", "UperNet") else pairs_of_pool
        found = pairs_of_own(name, tag, theirs, args) if name in RECIPES else pairs(name, source, theirs)
        yield attempt(tag, name, partial(compare, found))


def pairs_of_pool(name: str, source: Source, theirs: TimmNetwork) -> Iterator[Pair]:
    """Our numbers and timm's for a pooling or for fine-tuning, at two image sizes."""
    trained = name == "fine-tuning"
    pool = "avg" if trained else name.removeprefix("pool ")

    def pooled(network: TimmNetwork, images: Tensor) -> Tensor:
        tokens = network.forward_features(images)
        if pool == "native":
            return network.forward_head(tokens, pre_logits=True)
        return tokens[:, 0] if pool == "cls" else tokens[:, network.num_prefix_tokens :].mean(dim=1)

    grids, patch = {(SIDE, SIDE): trained, OTHER: False}, theirs.patch_embed.patch_size
    wanted = [run(resized(theirs, grid), images_of(grid, patch), pooled, grids[grid]) for grid in grids]
    ours = read(partial(PlainClassifier, num_classes=5, pool=pool, probe=not trained, img_size=source.size), source)
    for grid, numbers in zip(grids, wanted, strict=True):
        yield run(ours, images_of(grid, patch), PlainClassifier.features, grids[grid]), numbers


def pairs_of_maps(name: str, source: Source, theirs: TimmNetwork) -> Iterator[Pair]:
    """As `pairs_of_pool`, for UperNet at two sizes, and for ViTDet with global blocks and with a window of the map."""
    every, images = range(len(theirs.blocks)), images_of(MAP, PATCH)
    size: dict[str, Any] = {"img_size": tuple(images.shape[2:]), "out_blocks": every}

    def maps(network: TimmNetwork, images: Tensor) -> list[Tensor]:
        return network.forward_intermediates(images, indices=list(every), norm=False, intermediates_only=True)

    args = {**source.description["args"], "img_size": size["img_size"], "patch_size": PATCH[0]}
    for_maps = loaded_by_timm(source.name.removeprefix("timm:"), theirs, **args)
    wanted = run(resized(for_maps, MAP), images, maps, True)
    if name == "ViTDet":
        for whole in (every, ()):
            use = partial(PlainViTDet, **size, window_size=MAP[0], global_blocks=whole)
            yield run(read(use, source), images, trained=True), wanted
        return
    yield run(read(partial(PlainSegmentationViT, **size), source), images, trained=True), wanted
    images = images_of(OTHER, PATCH)  # by the tables of training
    wanted = run(resized(for_maps, OTHER), images, maps)
    yield run(read(partial(PlainSegmentationViT, **size), source), images), wanted


# The recipes for our own ViT, of MAE's shape

RECIPES: dict[str, Callable[..., nn.Module]] = {
    "own k-NN": partial(Classifier, 0, "cls", probe=True),
    "own fine-tuning": partial(Classifier, 5, "avg"),
    "own ViTDet": lambda **s: ViTDet(pretrain_img_size=s["img_size"], global_blocks=tuple(range(s["depth"])), **s),
    "own UperNet": lambda **s: SegmentationViT(layer_scale=1.0, out_blocks=(s["depth"] - 1,), **s),
}


def own_network(name: str, tag: str, theirs: TimmNetwork, args: dict, config: bool = True, part: bool = False) -> Any:
    """A recipe's network of the sizes that a user who knows the architecture sets, with timm's tensors.

    Args:
        name, tag, theirs, args: the recipe, and timm's network of a tag, built with `args`.
        config: timm's config.json is next to the file.
        part: load what fits, as --allow-partial does.
    """
    block, grid, patch = theirs.blocks[0], theirs.patch_embed.grid_size, theirs.patch_embed.patch_size
    hidden = getattr(getattr(getattr(block, "mlp", None), "fc1", None), "out_features", 4 * theirs.embed_dim)
    sizes = {"embed_dim": theirs.embed_dim, "depth": len(theirs.blocks), "mlp_ratio": hidden / theirs.embed_dim}
    sizes |= {"num_heads": getattr(getattr(block, "attn", None), "num_heads", 1)}
    ours = RECIPES[name](**sizes, img_size=(grid[0] * patch[0], grid[1] * patch[1]), patch_size=patch)
    described = {"architecture": tag.partition(".")[0], "model_args": args} if config else None
    found = checkpoints.recognise(Path(f"{tag}.safetensors"), theirs.state_dict(), described)
    new = NEW_IN_CLASSIFIERS if isinstance(ours, Classifier) else NEW_IN_BACKBONES
    _, state = checkpoints.fit(ours, found, new, partial=part)
    ours.load_state_dict(state, strict=False)
    return ours


def check_own(tag: str, theirs: TimmNetwork, args: dict, config: bool = True) -> list[Verdict]:
    """Which recipes load timm's tensors."""

    def loads(name: str) -> tuple[None, str]:
        with on_meta():
            own_network(name, tag, theirs, args, config)
        return None, ""

    return [attempt(tag, name, partial(loads, name)) for name in RECIPES]


def pairs_of_own(name: str, tag: str, theirs: TimmNetwork, args: dict, part: bool = False) -> Iterator[Pair]:
    """As `pairs_of_pool`, for a recipe for our own ViT."""
    ours, twin = in_float64(own_network(name, tag, theirs, args, part=part)), in_float64(copy.deepcopy(theirs))
    if name != "own k-NN":
        twin.norm = nn.Identity()
    if name == "own ViTDet" and twin.cls_token is not None:
        twin.cls_token, twin.num_prefix_tokens = None, twin.num_prefix_tokens - 1
        if twin.pos_embed is not None:
            twin.pos_embed = nn.Parameter(twin.pos_embed[:, -(SIDE**2) :].detach())

    def same(twin: TimmNetwork, images: Tensor) -> Tensor:
        tokens, prefix = twin.forward_features(images), twin.num_prefix_tokens
        if name == "own fine-tuning":
            norm = twin.fc_norm if isinstance(twin.fc_norm, nn.LayerNorm) else nn.LayerNorm(twin.embed_dim, 1e-6)
            return norm.double()(tokens[:, prefix:].mean(dim=1))
        return tokens[:, 0] if name == "own k-NN" else tokens[:, prefix:].transpose(1, 2).unflatten(2, (SIDE, SIDE))

    images = images_of((SIDE, SIDE), theirs.patch_embed.patch_size)
    yield run(ours, images, Classifier.features if isinstance(ours, Classifier) else None), run(twin, images, same)
