"""How images are prepared for an encoder: its own size, crop, interpolation, mean and standard deviation."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.data import resolve_data_config
from timm.layers import to_2tuple

from semaim.checkpoints.normalisation import Statistics
from semaim.encoders.contract import family_of
from semaim.errors import UserError, nearest


@dataclass(frozen=True)
class Preparation:
    """The preparation of images that a file or timm records for an encoder.

    Attributes:
        size: (height, width) in pixels.
        crop_pct: share of the resized image that the crop covers, along a side; None if it is not known.
        crop_mode: "center": the short side is resized, then the centre is cropped; "squash": both sides are resized;
            "border": as center, with a border where the image is too small.
        interpolation: of resizing, "bicubic", "bilinear" or "lanczos".
        statistics: mean and standard deviation; None if they are not known.
        unknown: why they are not, and what to do.
    """

    size: tuple[int, int]
    crop_pct: float | None
    crop_mode: str
    interpolation: str
    statistics: Statistics | None
    unknown: str = ""

    def __str__(self) -> str:
        """In words, for the log."""
        height, width = self.size
        crop = {"center": "centre crop", "border": "centre crop with a border", "squash": "both sides resized"}
        share = "a share that is not known" if self.crop_pct is None else f"{self.crop_pct:g}"
        how = f"{crop.get(self.crop_mode, self.crop_mode)} of {share}, {self.interpolation}"
        return f"{height} x {width} pixels, {how}; {self.statistics or self.unknown}"

    @classmethod
    def of_cfg(cls, cfg: Mapping[str, Any], origin: str) -> "Preparation":
        """From timm's `pretrained_cfg`, completed with timm's defaults."""
        found = resolve_data_config(pretrained_cfg={name: value for name, value in cfg.items() if value is not None})
        try:
            statistics = Statistics.checked(list(found["mean"]), list(found["std"]), 1, "pretrained_cfg", origin)
            _, height, width = found["input_size"]
            crop, mode, how = float(found["crop_pct"]), str(found["crop_mode"]), str(found["interpolation"])
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(f"{origin}: pretrained_cfg cannot be read: {error}") from None
        return cls((int(height), int(width)), crop, mode, how, statistics)


def cfg_of(tag: str) -> Mapping[str, Any]:
    """timm's `pretrained_cfg` of ARCH or ARCH.TAG; `UserError` if there is none."""
    arch, _, wanted = tag.partition(".")
    family_of(arch)  # refuses what is no plain ViT
    known = [name.partition(".")[2] for name in timm.list_models(f"{arch}.*", pretrained=True)]
    if not known:
        raise UserError(f"timm {timm.__version__} has no weights for {arch}: give a file and --arch {arch}")
    if wanted and wanted not in known:
        raise UserError(f"timm {timm.__version__} has no weights {tag}: {nearest(wanted, known)}")
    cfg = timm.get_pretrained_cfg(tag)
    assert cfg is not None  # it is listed
    return cfg.to_dict()


def preparation_of(path: Path, arch: str, args: Mapping[str, Any]) -> Preparation:
    """The preparation in transformers' or OpenCLIP's config next to a file, else that of the architecture."""
    size = to_2tuple(args.get("img_size") or family_of(arch).own_size(arch))
    origin = f"from the config next to {path.name}"
    file, clip = path.with_name("preprocessor_config.json"), path.with_name("open_clip_config.json")
    held: Any = {}
    try:
        if file.is_file():
            held = json.loads(file.read_text())
        elif clip.is_file():
            held = json.loads(clip.read_text()).get("preprocess_cfg") or {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    mean, std = (held.get(f"image_{part}") or held.get(part) for part in ("mean", "std"))
    if mean is None or std is None:
        return preparation_of_arch(arch, path, size)
    resample = {2: "bilinear", 3: "bicubic", 1: "lanczos"}.get(held.get("resample"), "bicubic")
    resample = held.get("interpolation", resample)
    squash = held.get("resize_mode") == "squash" or not held.get("do_center_crop", True)
    whole, crop = (held.get(key) for key in ("size", "crop_size"))
    short = whole.get("shortest_edge") if isinstance(whole, Mapping) else None
    crop_side = crop.get("height") if isinstance(crop, Mapping) else None
    share = crop_side / short if short and crop_side and not squash else 1.0
    statistics = Statistics.checked(mean, std, 1, str(file), origin)
    return Preparation(size, share, "squash" if squash else "center", resample, statistics)


def preparation_of_arch(
    arch: str, path: Path, size: tuple[int, int] | None = None, alike: Sequence[str] = ()
) -> Preparation:
    """timm's preparation for ARCH.TAG; for ARCH alone, what all its weights have in common.

    An architecture without weights in timm has the usual crop, 0.875 and bicubic, and no mean and std.

    Args:
        arch: name, perhaps with a tag.
        path: of the weights, for messages.
        size: (height, width) in pixels; None for the architecture's.
        alike: further architectures whose weights these may be.
    """
    name, _, tag = arch.partition(".")
    origin = f"timm's for {arch}"
    if tag:
        return Preparation.of_cfg(cfg_of(arch), origin)
    tags = [tag for one in dict.fromkeys((name, *alike)) for tag in timm.list_models(f"{one}.*", pretrained=True)]
    found = [Preparation.of_cfg(cfg_of(one), origin) for one in tags]
    size = size or family_of(name).own_size(name)
    numbers = {(one.statistics.mean, one.statistics.std) for one in found if one.statistics}
    crops = {(one.crop_pct, one.crop_mode, one.interpolation) for one in found}
    usual = None if crops else 0.875
    crop = crops.pop() if len(crops) == 1 else (usual, "center", "bicubic")
    if len(numbers) == 1:
        return Preparation(size, *crop, found[0].statistics)
    why = f"timm's weights for {name} have different ones" if numbers else f"timm has no weights for {name}"
    tagged = f": give --arch {tags[0]} or another tag of it" if tags else ""
    unknown = f"mean and std of the images of {path.name} are not known: {why}{tagged}"
    return Preparation(size, *crop, None, unknown)
