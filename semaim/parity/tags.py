"""Whether each consumer is right with every plain ViT that timm has weights for: computed, with no download.

timm's own network of a tag stands for the file: its names and shapes on the meta device, then random values in a network
of one or two blocks. Both go through the code that `timm:TAG` goes through. Each consumer has to give timm's numbers in
float64, and the gradients of all parameters that it trains, or to refuse by a `UserError`; all else is WRONG.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import create_transform, resolve_model_data_config
from timm.layers import to_2tuple
from timm.models import get_pretrained_cfg, list_models
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from semaim import checkpoints
from semaim.checkpoints.consumers import NEW_IN_BACKBONES, NEW_IN_CLASSIFIERS
from semaim.data.labelled import evaluation_transform
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
#: Right means equal up to rounding in float64: an epsilon of 1e-5 for 1e-6 changes tokens of variance 1 by 4.5e-6.
TOLERANCE = 1e-9
SIDE = 4  #: of the grid of patches that the position tables of the computed files are made for
OTHER = (5, 3)  #: grid of images of another size
MAP, PATCH = (6, 5), (16, 16)  #: grid and patches of a detector's images
WINDOW = 3  #: side of its windows; those at the right border are narrower
WIDE = 1300  #: networks wider than this are computed with one block, others with two

#: Consumers of any encoder, and the recipes for our own ViT, of MAE's shape.
CONSUMERS = ("images", "pool cls", "pool avg", "pool native", "fine-tuning", "ViTDet", "UperNet")
#: A tag is right if these are: cls and native exist only where the model has such a token or pooling.
NEEDED = ("images", "pool avg", "fine-tuning", "ViTDet", "UperNet")


@dataclass(frozen=True)
class Verdict:
    """The result of one consumer with a tag's file: right, refused, WRONG, or loads if nothing was computed."""

    tag: str
    consumer: str
    word: str
    reason: str = ""  #: of what is refused or WRONG
    error: float | None = None  #: largest difference that was computed, relative to the largest value if that exceeds 1


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
        held = cfg.to_dict()
        key = (tag.partition(".")[0], cfg.input_size, cfg.fixed_input_size, held.get("global_pool"))
        groups.setdefault(key, []).append(tag)
    return [tuple(group) for group in groups.values()]


def right_tags(verdicts: Iterable[Verdict]) -> list[str]:
    """The tags that every consumer of `NEEDED` is right with, and none is wrong with."""
    words: dict[str, dict[str, str]] = {}
    for verdict in verdicts:
        words.setdefault(verdict.tag, {})[verdict.consumer] = verdict.word
    fine = ("right", "loads")
    return [
        tag
        for tag, own in words.items()
        if "WRONG" not in own.values() and all(own.get(consumer) in fine for consumer in NEEDED)
    ]


def judge(tags: Sequence[str], compute: bool = True, depth: int | None = None) -> Iterator[Verdict]:
    """The verdicts of all consumers on the tags of one group of `architectures`.

    Args:
        tags: of the group. The first is computed for all, except for the preparation of images.
        compute: compare numbers where names and shapes fit.
        depth: compare names and shapes in networks of this many blocks; None for all blocks.
    """
    tag = tags[0]
    args = {name: value for name, value in small(tag, depth).items() if name != "img_size"} if depth else {}
    theirs = build(tag, **args)
    for one in tags:
        yield check_images(one, theirs)
    try:
        source = source_of(tag, theirs, args)
    except UserError as error:
        yield from (Verdict(one, name, "refused", str(error)) for one in tags for name in CONSUMERS[1:])
    else:
        found = check_names(tag, source, theirs)
        if compute:
            fits = [name for name, verdict in found.items() if verdict.word == "loads"]
            found |= compute_all(tag, fits, theirs.embed_dim > WIDE)
        yield from (Verdict(one, v.consumer, v.word, v.reason, v.error) for one in tags for v in found.values())
    for own in judge_own(tag, theirs, args, compute=compute):
        yield from (Verdict(one, own.consumer, own.word, own.reason, own.error) for one in tags)


# Names, shapes, and images


#: What networks fill new weights with, which are read from a file afterwards.
RANDOM = ("normal_", "uniform_", "erfinv_")


class Unfilled(TorchFunctionMode):
    """Context in which new tensors get no random values, and on the meta device none at all: building is fast."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Leave that out."""
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


def build(tag: str, **args: Any) -> TimmNetwork:
    """timm's network of a tag on the meta device."""
    with on_meta():
        return timm.create_model(tag, pretrained=False, **args)


def source_of(tag: str, theirs: TimmNetwork, args: dict) -> Source:
    """What `timm:TAG` opens if the file holds the tensors of `theirs`."""
    preparation = Preparation.of_cfg(cfg_of(tag), f"timm's for {tag}")
    with on_meta():
        return of_timm(f"timm:{tag}", Path(tag), tag.partition(".")[0], args, preparation, theirs.state_dict())


def check_images(tag: str, theirs: TimmNetwork) -> Verdict:
    """Compare the preparation of images with timm's: its values, and the transforms made from them."""
    theirs.pretrained_cfg = get_pretrained_cfg(tag).to_dict()  # type: ignore[union-attr]
    wanted = resolve_model_data_config(theirs)
    try:
        own = Preparation.of_cfg(cfg_of(tag), tag)
    except UserError as error:
        return Verdict(tag, "images", "refused", str(error))
    if own.statistics is None:
        return Verdict(tag, "images", "refused", own.unknown)
    values: dict[str, Any] = {"crop_pct": own.crop_pct, "crop_mode": own.crop_mode, "interpolation": own.interpolation}
    values |= {"mean": own.statistics.mean, "std": own.statistics.std}
    transform = evaluation_transform(own.size, **values)  # type: ignore[arg-type]
    differ = [name for name, value in values.items() if value != wanted[name]]
    differ += ["size"] if own.size != wanted["input_size"][-2:] else []
    differ += ["transform"] if repr(transform) != repr(create_transform(**wanted)) else []
    return Verdict(tag, "images", "WRONG" if differ else "right", f"{', '.join(differ)} differ" if differ else "")


def check_names(tag: str, source: Source, theirs: TimmNetwork) -> dict[str, Verdict]:
    """Which consumers load the tensors; WRONG if they are not all that timm computes with."""
    theirs.reset_classifier(0)
    with on_meta():
        lost = set(theirs.state_dict()) ^ set(source.build().load(source).matched)
    reason = f"not read: {', '.join(sorted(lost)[:3])}" if lost else ""
    if source.size != tuple(theirs.patch_embed.img_size):
        reason = f"tables of {theirs.patch_embed.img_size} are read as those of {source.size}"
    return {name: fits(tag, name, use, source, reason) for name, use in uses(source).items()}


def fits(tag: str, name: str, use: Callable[[], OnEncoder], source: Source, reason: str) -> Verdict:
    """Whether a consumer loads the tensors, and all that it has; `reason` is why it is WRONG in any case."""
    try:
        with on_meta():
            network = use()
            lost = {name.removeprefix("vit.") for name in network.encoder.state_dict()}
            lost ^= set(network.encoder.load(source).matched)
    except UserError as error:
        return Verdict(tag, name, "refused", str(error))
    except Exception as error:  # no answer to a user
        return Verdict(tag, name, "WRONG", f"{type(error).__name__}: {error}")
    reason = reason or (f"not loaded: {', '.join(sorted(lost)[:3])}" if lost else "")
    return Verdict(tag, name, "WRONG" if reason else "loads", reason)


def uses(source: Source) -> dict[str, Callable[[], OnEncoder]]:
    """The networks of the consumers of any encoder, as the plain configs build them."""
    encoder, size = source.description, source.preparation.size
    return {
        **{f"pool {pool}": partial(PlainClassifier, encoder, 0, pool, True, img_size=size) for pool in POOLS},
        "fine-tuning": partial(PlainClassifier, encoder, 5, "avg", img_size=size),
        "ViTDet": partial(PlainViTDet, encoder),
        "UperNet": partial(PlainSegmentationViT, encoder),
    }


# Numbers


@dataclass
class Outcome:
    """What a network computes: outputs, and the norm of every parameter's gradient, by timm's name."""

    outputs: list[Tensor]
    norms: dict[str, float]

    def differs(self, wanted: "Outcome") -> tuple[float, str]:
        """The largest difference from timm's, and what differs."""
        differences = {}
        for index, (own, theirs) in enumerate(zip(self.outputs, wanted.outputs, strict=True)):
            if own.shape != theirs.shape:
                return float("inf"), f"output {index} is {tuple(own.shape)}, not {tuple(theirs.shape)}"
            size = max(1.0, theirs.abs().max().item())
            differences[f"output {index}"] = (own - theirs).abs().max().item() / size
        for name, norm in self.norms.items():
            theirs = wanted.norms.get(name, float("nan"))
            differences[f"gradient of {name}"] = abs(norm - theirs) / max(1.0, theirs)
        if broken := [name for name, value in differences.items() if value != value]:
            return float("inf"), f"not a number or missing: {broken[0]}"
        name = max(differences, key=differences.__getitem__)
        return differences[name], f"{name} differs by {differences[name]:.1e}"


def run(network: nn.Module, outputs: Callable[..., Any], images: Tensor, trained: bool) -> Outcome:
    """The outcome for some images, with gradients if the network is trained; timm's takes part as an argument."""
    ours = isinstance(network, OnEncoder)
    network.train(trained)
    torch.manual_seed(0)  # some of timm's positions are varied in training
    with torch.set_grad_enabled(trained):
        computed = outputs(images) if ours else outputs(network, images)
    found = [computed] if isinstance(computed, Tensor) else list(computed)
    norms: dict[str, float] = {}
    if trained:
        loss = torch.stack([(one * torch.arange(one.numel()).double().cos().view_as(one)).sum() for one in found]).sum()
        named = {name: p for name, p in (network.encoder if ours else network).named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for name, gradient in zip(named, gradients, strict=True):
            norms[name.removeprefix("vit.")] = float("nan") if gradient is None else gradient.norm().item()
    return Outcome([one.detach() for one in found], norms)


def random_network(tag: str, **args: Any) -> TimmNetwork:
    """timm's network of a tag, with random values in every tensor of its file."""
    with Unfilled():
        theirs: TimmNetwork = timm.create_model(tag, pretrained=False, num_classes=5, **args).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            if tensor.is_floating_point():
                tensor.normal_(std=0.05, generator=generator).add_("norm" in name and name.endswith("weight"))
    return theirs


def resized(theirs: TimmNetwork, grid: Sequence[int], patch: tuple[int, int] | None = None) -> TimmNetwork:
    """timm's network in float64 for another grid of patches, perhaps of another size."""
    twin = copy.deepcopy(theirs)
    height, width = patch or theirs.patch_embed.patch_size
    with torch.no_grad():
        twin.set_input_size(img_size=(grid[0] * height, grid[1] * width), patch_size=patch)
    return in_float64(twin)


def in_float64(network: Any) -> Any:
    """A network with parameters in float64; tables that are computed stay as they are in training, in float32."""
    for parameter in network.parameters():
        parameter.data = parameter.data.double()
    return network


class Masked(TorchFunctionMode):
    """Windows by a mask over all tokens, a plain second form: a patch sees its window and the prefix tokens.

    Args:
        prefix: number of prefix tokens, which see everything.
    """

    def __init__(self, prefix: int):
        super().__init__()
        row, column = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, MAP), indexing="ij"))
        window = row // WINDOW * MAP[1] + column // WINDOW
        self.seen = torch.ones(prefix + len(row), prefix + len(row), dtype=torch.bool)
        self.seen[prefix:, prefix:] = window[:, None] == window
        within = prefix + row % WINDOW * WINDOW + column % WINDOW
        self.place = torch.cat([torch.arange(prefix), within])  # of a token in the table of one window

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Add the mask to attention."""
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            bias = kwargs.pop("attn_mask", None)
            if bias is None:
                bias = args[0].new_zeros(self.seen.shape)
            elif bias.shape[-1] != len(self.place):
                bias = bias[..., self.place[:, None], self.place]
            kwargs["attn_mask"] = bias.masked_fill(~self.seen, float("-inf"))
        return func(*args, **kwargs)


def with_windows(theirs: TimmNetwork, blocks: Iterable[int]) -> TimmNetwork:
    """timm's network for a map, with some blocks restricted to windows by a mask."""
    twin = resized(theirs, MAP, PATCH)
    for index in blocks:
        block, before = twin.blocks[index], theirs.blocks[index]
        if hasattr(getattr(block, "attn", None), "set_window_size"):  # a table: that of the file, for one window
            block.attn = copy.deepcopy(before.attn)
            block.attn.set_window_size((WINDOW, WINDOW))
            in_float64(block.attn)
        block.forward = partial(_masked, block.forward, theirs.num_prefix_tokens)
    return twin


def _masked(forward: Callable, prefix: int, *args: Any, **kwargs: Any) -> Any:
    with Masked(prefix):
        return forward(*args, **kwargs)


def compute_all(tag: str, names: Sequence[str], wide: bool) -> dict[str, Verdict]:
    """Compare the numbers of the consumers of these names with timm's, in a network of one or two random blocks."""
    args = small(tag, 1 if wide else 2)
    theirs = random_network(tag, **args)
    source = source_of(tag, theirs, args)
    return {name: compute(tag, name, source, theirs) for name in names}


def small(tag: str, depth: int) -> dict[str, Any]:
    """Arguments for a network of this many blocks, the first and the last ones, with small position tables."""
    found = entry(tag.partition(".")[0]).arguments
    blocks = found.get("depth", 12)
    args = {name: (value[0], value[-1])[-depth:] for name, value in found.items() if is_per_block(value, blocks)}
    patch = to_2tuple(found.get("patch_size", 16))
    return {**args, "depth": depth, "img_size": tuple(SIDE * side for side in patch)}


def is_per_block(value: Any, blocks: int) -> bool:
    """Whether an argument has one value for each block."""
    return isinstance(value, list | tuple) and len(value) == blocks


def compute(tag: str, name: str, source: Source, theirs: TimmNetwork) -> Verdict:
    """Compare one consumer's numbers with timm's."""
    error, cause = 0.0, ""
    try:
        for own, wanted in pairs(name, source, theirs):
            found = own.differs(wanted)
            error, cause = max((error, cause), found, key=lambda one: one[0])
    except UserError as refused:
        return Verdict(tag, name, "refused", str(refused))
    except Exception as failed:  # no answer to a user
        return Verdict(tag, name, "WRONG", f"{type(failed).__name__}: {failed}")
    wrong = error > TOLERANCE
    return Verdict(tag, name, "WRONG" if wrong else "right", cause if wrong else "", error)


def pairs(name: str, source: Source, theirs: TimmNetwork) -> Iterator[tuple[Outcome, Outcome]]:
    """Our outcome and timm's, for everything that is compared for one consumer."""
    if name in ("ViTDet", "UperNet"):
        yield from pairs_of_maps(name, source, theirs)
        return
    trained = name == "fine-tuning"
    pool = "avg" if trained else name.removeprefix("pool ")
    ours = read(partial(PlainClassifier, num_classes=5, pool=pool, probe=not trained, img_size=source.size), source)

    def pooled(network: TimmNetwork, images: Tensor) -> Tensor:
        tokens = network.forward_features(images)
        if pool == "native":
            return network.forward_head(tokens, pre_logits=True)
        return tokens[:, 0] if pool == "cls" else tokens[:, network.num_prefix_tokens :].mean(dim=1)

    for grid in ((SIDE, SIDE), OTHER):
        twin, images = resized(theirs, grid), images_of(grid, theirs.patch_embed.patch_size)
        training = trained and grid != OTHER
        yield run(ours, ours.features, images, training), run(twin, pooled, images, training)


def pairs_of_maps(name: str, source: Source, theirs: TimmNetwork) -> Iterator[tuple[Outcome, Outcome]]:
    """As `pairs`, for UperNet at two sizes, and for ViTDet with all blocks global and with windows in the first."""
    every = range(len(theirs.blocks))
    size = {"img_size": (MAP[0] * PATCH[0], MAP[1] * PATCH[1]), "out_blocks": every}

    def maps(network: TimmNetwork, images: Tensor) -> list[Tensor]:
        return network.forward_intermediates(images, indices=list(every), norm=False, intermediates_only=True)

    if name == "ViTDet":
        for windows in ((), every[:1]):
            whole = [index for index in every if index not in windows]
            ours = read(partial(PlainViTDet, **size, window_size=WINDOW, global_blocks=whole), source)
            twin, images = with_windows(theirs, windows), images_of(MAP, PATCH)
            yield run(ours, ours, images, bool(windows)), run(twin, maps, images, bool(windows))
        return
    ours = read(partial(PlainSegmentationViT, **size), source)
    twin, images = resized(theirs, MAP, PATCH), images_of(MAP, PATCH)
    yield run(ours, ours, images, True), run(twin, maps, images, True)
    twin, images = resized(twin, OTHER), images_of(OTHER, PATCH)  # from the tables for training
    yield run(ours, ours, images, False), run(twin, maps, images, False)


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


# Our own ViT, by the recipes of SemAIM's and MAE's


def _class_token(theirs: TimmNetwork, images: Tensor) -> Tensor:
    return theirs.forward_features(images)[:, 0]


def _unnormed(theirs: TimmNetwork, images: Tensor) -> Tensor:
    theirs.norm = nn.Identity()
    return theirs.forward_features(images)[:, theirs.num_prefix_tokens :]


def _own_norm(theirs: TimmNetwork, images: Tensor) -> Tensor:
    pooled = _unnormed(theirs, images).mean(dim=1)
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


def _features(ours: Classifier, images: Tensor) -> Tensor:
    return ours.features(images)


def _vitdet(**sizes: Any) -> ViTDet:  # every block global: timm has no windows
    return ViTDet(pretrain_img_size=sizes["img_size"], global_blocks=tuple(range(sizes["depth"])), **sizes)


def _segmentor(**sizes: Any) -> SegmentationViT:
    return SegmentationViT(layer_scale=1.0, out_blocks=(sizes["depth"] - 1,), **sizes)


@dataclass(frozen=True)
class Recipe:
    """A consumer of our own ViT: its network, its new parameters, its features, and the same features by timm."""

    build: Callable[..., nn.Module]
    new: tuple[str, ...]
    ours: Callable[[Any, Tensor], Tensor]
    theirs: Callable[[TimmNetwork, Tensor], Tensor]


RECIPES = {
    "own k-NN": Recipe(lambda **s: Classifier(0, "cls", probe=True, **s), NEW_IN_CLASSIFIERS, _features, _class_token),
    "own fine-tuning": Recipe(lambda **s: Classifier(5, "avg", **s), NEW_IN_CLASSIFIERS, _features, _own_norm),
    "own ViTDet": Recipe(_vitdet, NEW_IN_BACKBONES, _map, _without_class_token),
    "own UperNet": Recipe(_segmentor, NEW_IN_BACKBONES, _map, _unnormed),
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


def judge_own(
    tag: str, theirs: TimmNetwork, args: dict, config: bool = True, compute: bool = True
) -> Iterator[Verdict]:
    """The verdicts of the recipes for our own ViT on a file, with or without timm's config.json next to it."""
    image = tuple(theirs.patch_embed.img_size)
    for name, recipe in RECIPES.items():
        try:
            with on_meta():
                checkpoints.fit(
                    recipe.build(img_size=image, **sizes_in(theirs)), file_of(theirs, tag, config, args), recipe.new
                )
        except UserError as error:
            yield Verdict(tag, name, "refused", str(error))
            continue
        error = difference(recipe, tag) if compute else None
        word = "loads" if error is None else "right" if error <= TOLERANCE else "WRONG"
        yield Verdict(tag, name, word, f"features differ by {error:.1e}" if word == "WRONG" else "", error)


def file_of(theirs: TimmNetwork, tag: str, config: bool, args: dict) -> checkpoints.Checkpoint:
    """What `checkpoints.read` finds in timm's file of a network, with or without config.json."""
    described = {"architecture": tag.partition(".")[0], "model_args": args} if config else None
    return checkpoints.recognise(Path(f"{tag}.safetensors"), theirs.state_dict(), described)


@torch.no_grad()
def difference(recipe: Recipe, tag: str) -> float:
    """The largest difference between the features of a recipe and timm's, in a network of one random block."""
    args = small(tag, 1)
    theirs = random_network(tag, **args)
    ours = recipe.build(img_size=args["img_size"], **sizes_in(theirs)).eval()
    _, state = checkpoints.fit(ours, file_of(theirs, tag, True, args), recipe.new, partial=True)
    ours.load_state_dict(state, strict=False)
    images = images_of((SIDE, SIDE), theirs.patch_embed.patch_size)
    return (recipe.ours(ours.double(), images) - recipe.theirs(theirs.double(), images)).abs().max().item()
