"""What a run takes from the source of its encoder: the architecture, and the preparation of images, where the config
leaves them open."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from semaim import checkpoints
from semaim.checkpoints.consumers import LINEAR, NEW_IN_CLASSIFIERS, check_task
from semaim.checkpoints.dialects import find_weights
from semaim.checkpoints.loading import LoadReport
from semaim.checkpoints.normalisation import Statistics, settle
from semaim.encoders.contract import Source, without_memory
from semaim.encoders.networks import OnEncoder
from semaim.encoders.sources import architecture, open_source, trained_here
from semaim.engine.classes import registered
from semaim.errors import UserError
from semaim.models.classifier import Classifier
from semaim.models.vit import SIZES
from semaim.places import is_name

#: Sizes of our own ViT in a config, which an encoder of another family must not contradict.
OWN_SIZES = ("embed_dim", "depth", "num_heads", "patch_size", "mlp_ratio", "in_chans")


def holder_of(cfg: Config) -> Any:
    """The part of a config that describes the encoder: a classifier's network, or a backbone."""
    model = cfg.model.get("module") or cfg.model  # inside test-time augmentation
    return model.get("network") or model.get("backbone") or {}


def settle_images(cfg: Config, weights: str | None, resumed: str | None = None, whole: bool = False) -> Statistics:
    """Complete a config by what the encoder's source says: architecture, image size, crop, mean and deviation.

    Args:
        cfg: completed in place; what it sets itself is kept.
        weights: the source of the encoder, see `semaim.encoders.sources`, or a whole model's checkpoint; None for
            random weights.
        resumed: this run's own checkpoint, whose settings the config has already.
        whole: the weights are those of the whole model, not of an encoder for it.

    Returns:
        The statistics that images are normalised with.
    """
    if resumed:
        return settle(cfg, resumed)
    source = source_of(cfg, weights, whole)
    if source is None:
        return _settle_own(cfg, weights)
    holder, preparation = holder_of(cfg), source.preparation
    check_sizes(holder, source, cfg.get("filename") or "the config")
    if not whole and (source.state or source.checkpoint):
        with without_memory():
            source.build().load(source)  # raises, if the weights are not this architecture's
    holder.encoder = source.description
    set_widths(cfg, source)
    if "dataset" in cfg:
        height, width = preparation.size
        if holder.get("img_size") is None:
            if height != width:
                raise UserError(f"{source.name} is for images of {height} x {width}: set model.network.img_size")
            holder.img_size = height
        if preparation.crop_pct is None and cfg.dataset.get("crop_pct") is None:
            raise UserError(
                f"the crop of {source.name}'s images is not known, as timm's weights of that architecture differ: name"
                " them, --arch NAME.TAG, or set --cfg-options dataset.crop_pct=..."
            )
        named = {"crop_pct": preparation.crop_pct, "crop_mode": preparation.crop_mode}
        for key, value in {**named, "interpolation": preparation.interpolation}.items():
            if cfg.dataset.get(key) is None:
                cfg.dataset[key] = value
    return settle(cfg, None, preparation.statistics, preparation.unknown)


def set_widths(cfg: Config, source: Source) -> None:
    """Give necks and heads whose width a config leaves open that of the backbone's maps."""
    parts = [cfg.model.get(name) for name in ("neck", "decode_head", "auxiliary_head")]
    wanted = [(part, key) for part in parts if part for key in ("in_channels", "embed_dim") if part.get(key, 0) is None]
    if wanted:
        backbone: Any = registered(cfg, MODELS, holder_of(cfg).type, "model.backbone")
        with without_memory():
            width = getattr(backbone, "map_width", OnEncoder.map_width)(source.build())
        for part, key in wanted:
            several = isinstance(part.get("in_index"), list | tuple)
            part[key] = [width] * len(part["in_index"]) if several else width


def _settle_own(cfg: Config, weights: str | None) -> Statistics:
    """As `settle_images`, for our own networks: sizes of a checkpoint of ours or MAE's."""
    holder = holder_of(cfg)
    if "dataset" in cfg and "img_size" in holder:
        if holder.img_size is None:
            size = checkpoints.read(weights).sizes["img_size"] if weights else None
            holder.img_size = size[0] if size and size[0] == size[1] else 224
        if "crop_pct" in cfg.dataset and cfg.dataset.crop_pct is None:
            cfg.dataset.crop_pct = 0.875
    return settle(cfg, weights)


def source_of(cfg: Config, weights: str | None, whole: bool = False) -> Source | None:
    """The source of an encoder that another network than our own computes; None for our own network.

    Arguments as for `settle_images`.
    """
    holder, arch = holder_of(cfg), cfg.get("arch")
    any_encoder = "encoder" in holder or holder.get("size", "base") is None
    takes = any_encoder or holder.get("type") == "Classifier"
    if weights is None:
        if arch and takes:
            return architecture(arch)
        if any_encoder and not holder.get("encoder"):
            raise UserError(
                f"{cfg.filename} is for any encoder: name one, such as --pretrained timm:NAME, or FILE --arch NAME"
            )
        return None
    if not takes:
        if is_name(weights) or arch:
            raise UserError(
                f"{cfg.filename} is a recipe for our own ViT, of MAE's and SemAIM's shape, and reads files: for"
                f" {weights} use a config plain_*.py of the same folder"
            )
        return None
    if any_encoder or is_name(weights) or arch:
        return open_source(weights, arch)
    if not os.path.isfile(weights) or cfg.get("allow_partial"):
        return None  # what reads it says what is wrong
    content = checkpoints.read_file(weights)
    if trained_here(content):
        return open_source(weights)
    if whole:
        return None
    refused = own_refusal(cfg, weights)
    if refused is None:
        return None
    try:
        found = open_source(weights)
        if found.checkpoint is not None:  # of our own ViT's shape, in another size
            raise refused
        return found
    except UserError as error:
        if str(error) == str(refused) or "--arch" not in str(error):
            raise refused from None
        raise UserError(f"{refused}; as another encoder: {error}") from None


def own_refusal(cfg: Config, weights: str) -> UserError | None:
    """Why our own classifier does not read a file; None if it does."""
    network = {key: value for key, value in holder_of(cfg).items() if key not in ("type", "encoder", "num_classes")}
    network["img_size"] = network.get("img_size") or 224
    try:
        found = checkpoints.read(weights)
        with torch.device("meta"):
            checkpoints.fit(Classifier(0, **network), found, NEW_IN_CLASSIFIERS)
    except UserError as error:
        return error
    except (ValueError, TypeError):
        return None  # of the config: building it says what is wrong
    return None


def check_sizes(holder: Mapping[str, Any], source: Source, config: str) -> None:
    """`UserError` if a config names sizes of our own ViT that the source's encoder does not have."""
    if holder.get("size", None) is None and not any(holder.get(key) for key in OWN_SIZES[:3]):
        return
    if holder.get("fc_norm") is not None:
        raise UserError(f"{config}: fc_norm is of SemAIM's own protocol: use a config plain_*.py for {source.name}")
    wanted = {key: holder.get(key) or value for key, value in SIZES.get(holder.get("size", "base"), {}).items()}
    with without_memory():
        encoder = source.build()
    for key in ("embed_dim", "depth"):
        if wanted.get(key) and wanted[key] != getattr(encoder, key):
            raise UserError(
                f"{source.name} is {encoder.title}, of width {encoder.embed_dim} and depth {encoder.depth}; {config} is"
                f" for {wanted['embed_dim']} and {wanted['depth']}: use a config of that size, or plain_*.py"
            )


def head_of(weights: str) -> tuple[torch.Tensor | None, list[str] | None]:
    """The weights of a trained classifier's head, and the names of its classes; None where the file has none."""
    content = checkpoints.read_file(weights)
    if trained_here(content):
        state, classes = find_weights(content)[1], checkpoints.classes_of(content)
    else:
        found = checkpoints.read(weights)
        state, classes = found.state, found.classes
    head = next((state[name] for name in LINEAR if name in state), None)
    return head, list(classes) if classes else None


def load_classifier(network: nn.Module, weights: str) -> LoadReport | None:
    """Load all weights of a trained classifier on any encoder, strictly; None if the network is another."""
    if not isinstance(network, OnEncoder):
        return None
    state, own = find_weights(checkpoints.read_file(weights))[1], network.state_dict()
    wrong = [name for name in own if name not in state or state[name].shape != own[name].shape]
    extra = [name for name in state if name not in own]
    if wrong or extra:
        raise UserError(
            f"{weights} does not fit this config's classifier: {checkpoints.kinds(wrong + extra)}: evaluate it with the"
            " config of its training"
        )
    network.load_state_dict(state)
    return LoadReport(Path(weights), "semaim", list(own))


def load_encoder(network: nn.Module, weights: str, cfg: Config) -> LoadReport | None:
    """Load the source's weights into a network on any encoder; None if network or encoder are the config's own.

    Args:
        network: perhaps on the meta device, where it is only checked.
        weights: the source.
        cfg: of the run; names `arch`, and says by `allow_partial` what is not possible here.
    """
    if not isinstance(network, OnEncoder) or network.sized:
        return None
    if cfg.get("allow_partial"):
        raise UserError("--allow-partial is for our own ViT: any other encoder is read whole, or refused")
    source = open_source(weights, cfg.get("arch"))
    if source.checkpoint is not None and cfg.default_scope in ("mmdet", "mmseg"):
        check_task(source.checkpoint, cfg.default_scope)
    if next(network.parameters()).is_meta:
        with without_memory():
            return network.encoder.load(source)
    return network.encoder.load(source)
