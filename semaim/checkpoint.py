"""Checkpoints of plain ViTs in every dialect: read without running code, load with a report, convert, export.

Inside, a checkpoint's weights have our names, which are timm's: `cls_token`, `pos_embed`, `patch_embed.proj`,
`blocks.N.{norm1,attn.qkv,attn.proj,norm2,mlp.fc1,mlp.fc2}`, `norm`, `fc_norm`, `head`.
"""

import json
import math
import os
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed, to_2tuple
from torch import Tensor, nn

from semaim import __version__
from semaim.engine.checkpointing import FORMAT, write_checkpoint
from semaim.errors import UserError, nearest
from semaim.models.vit import SIZES

#: mmpretrain's names (left) and ours; {n} is a block. Where two of theirs stand for one of ours, the first is written.
MMPRETRAIN = (
    ("backbone.cls_token", "cls_token"),
    ("backbone.pos_embed", "pos_embed"),
    ("backbone.patch_embed.projection", "patch_embed.proj"),
    ("backbone.layers.{n}.ln1", "blocks.{n}.norm1"),
    ("backbone.layers.{n}.attn.qkv", "blocks.{n}.attn.qkv"),
    ("backbone.layers.{n}.attn.proj", "blocks.{n}.attn.proj"),
    ("backbone.layers.{n}.ln2", "blocks.{n}.norm2"),
    ("backbone.layers.{n}.ffn.layers.0.0", "blocks.{n}.mlp.fc1"),
    ("backbone.layers.{n}.ffn.layers.1", "blocks.{n}.mlp.fc2"),
    ("backbone.ln1", "norm"),
    ("backbone.norm1", "norm"),  # before 1.0
    ("backbone.ln2", "fc_norm"),
    ("neck.bn", "head.0"),  # the batch normalisation of a linear probe
)
#: Their head has a name of its own in each classifier: of the class token, of the mean of the patches, of a probe.
MMPRETRAIN_HEADS = (("head.layers.head", "head"), ("head.fc", "head"), ("head.layers.head", "head.1"))

#: What an encoder and a classifier consist of; all else is a decoder, a neck or a head of another task.
ENCODER = ("cls_token", "pos_embed", "patch_embed", "blocks", "norm")
CLASSIFIER = ("fc_norm", "head")

DIALECTS = ("semaim", "timm", "mae", "mmpretrain")  #: that `convert` writes

#: Records that files of the field's tools hold beside their weights. They are read as inert stand-ins, never imported.
HARMLESS = re.compile(
    r"(argparse\.Namespace|_codecs\.encode|builtins\.(getattr|set|frozenset|slice|complex|bytearray|object)"
    r"|(mmengine|mmcv|mmdet|mmseg|mmpretrain|mmcls|detectron2|fvcore|timm|omegaconf|yacs|numpy|pathlib|collections|typing"
    r"|datetime)\..+)"
)
#: All that a pickle of numpy arrays needs (detectron2's .pkl).
ARRAYS = {"multiarray._reconstruct", "multiarray.scalar", "numpy.ndarray", "numpy.dtype", "_codecs.encode"}


# Reading


def read_file(path: str | os.PathLike) -> Any:
    """The content of .safetensors, .pth or detectron2's .pkl, on the CPU; a file that would run code is refused."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such checkpoint: {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".pkl":
            with open(path, "rb") as file:
                return _ArrayUnpickler(file, encoding="latin1").load()
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            for name in names:
                if not HARMLESS.fullmatch(name):
                    raise _refusal(path, name) from None
            stand_ins = [(type("StandIn", (_Inert,), {}), name) for name in names]
            with torch.serialization.safe_globals(stand_ins):
                return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # zip, pickle, header and memory errors are of many types
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in reason:
            reason = "it holds more than tensors and plain containers"
        raise UserError(f"cannot read {path}: broken or no checkpoint ({reason})") from None


def _refusal(path: Path | str, name: str) -> UserError:
    return UserError(f"{path} is refused: reading it would call {name}, which no checkpoint needs")


class _Inert:
    """Stands for an object that is not wanted: takes any arguments and state, and does nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


class _ArrayUnpickler(pickle.Unpickler):
    """Plain containers and numpy arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module.rpartition('.')[2]}.{name}" not in ARRAYS or module.partition(".")[0] not in ("numpy", "_codecs"):
            raise _refusal("the file", f"{module}.{name}")
        return super().find_class(module, name)


@dataclass
class Checkpoint:
    """A ViT's weights under our names, and what else the file tells."""

    path: Path
    dialect: str
    state: dict[str, Tensor]  #: encoder, and the head or decoder that stands beside it
    other: list[str]  #: names that were not taken: copies, heads of other tasks
    epoch: int | None = None
    config: dict | None = None  #: of a run of ours
    classes: list[str] | None = None

    @property
    def sizes(self) -> dict:
        """Sizes of the encoder, as `VisionTransformer` takes them; see `sizes_of`."""
        network = ((self.config or {}).get("model") or {}).get("network") or {}
        return sizes_of(self.state, network)


def sizes_of(state: Mapping[str, Tensor], network: Mapping | None = None) -> dict:
    """embed_dim, depth, num_heads, patch_size, img_size (height, width) and mlp_ratio of an encoder's weights.

    Heads leave no trace in the weights: `network`, the config of a run of ours, tells them, or the published model of
    that width and depth; else they are 64 channels wide.
    """
    width, _, *patch = state["patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    known = next((s["num_heads"] for s in SIZES.values() if (s["embed_dim"], s["depth"]) == (width, depth)), None)
    heads = (network or {}).get("num_heads") or known or max(1, width // 64)
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


def describe(sizes: Mapping) -> str:
    """Sizes in words."""
    name = next(
        (n for n, s in SIZES.items() if (s["embed_dim"], s["depth"]) == (sizes["embed_dim"], sizes["depth"])), ""
    )
    patch = "x".join(map(str, dict.fromkeys(sizes["patch_size"])))
    text = f"ViT{'-' + name if name else ''} of width {sizes['embed_dim']}, depth {sizes['depth']}, patch {patch}"
    return text + (f", {'x'.join(map(str, dict.fromkeys(sizes['img_size'])))} px" if sizes["img_size"] else "")


def read(path: str | os.PathLike) -> Checkpoint:
    """Read a checkpoint of any dialect; `UserError` if it holds no plain ViT encoder."""
    content = read_file(path)
    container, weights = _find_weights(content)
    names = [name for name in weights if re.search(r"(^|\.)patch_embed\.proj(ection)?\.weight$", name)]
    names = [name for name in names if not re.search(r"(^|\.)ema\.", name)]
    if not names:
        held = ", ".join(list(dict.fromkeys(str(name).split(".")[0] for name in weights))[:6]) or "nothing"
        raise UserError(f"no ViT encoder in {path}: it holds {held}")
    first = min(names, key=len)
    prefix = first[: first.rindex("patch_embed")]
    ours = {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}
    other = [name for name in weights if not name.startswith(prefix)]

    if container == FORMAT:
        dialect = "semaim"
    elif isinstance(content.get("model"), str):
        dialect = "official SemAIM"
    elif "patch_embed.projection.weight" in ours:
        dialect = "mmpretrain"
        heads = {name: weights[name] for name in other if name.startswith(("head.", "neck.bn."))}
        ours = _from_mmpretrain({**{f"backbone.{name}": tensor for name, tensor in ours.items()}, **heads})
        other = [name for name in other if name not in heads]
    elif prefix.endswith("backbone.net."):
        dialect = "detectron2"
    elif container == "teacher":
        dialect = "DINO"
    elif prefix.endswith("backbone."):
        dialect = "detector or segmentor"
    else:
        dialect = "mae" if container == "model" else "timm"
    copies = [name for name in ours if name.startswith("ema.")]
    state = {name: tensor for name, tensor in ours.items() if name not in copies}
    if "blocks.0.attn.qkv.weight" not in state:
        raise UserError(f"no plain ViT encoder in {path}: it has patches but no blocks.0.attn.qkv")
    epoch = content.get("epoch")
    epoch = epoch if isinstance(epoch, int) else (content.get("meta") or {}).get("epoch") if container else None
    return Checkpoint(
        Path(path),
        dialect,
        state,
        other + copies,
        epoch if isinstance(epoch, int) else None,
        content.get("config") if container == FORMAT else None,
        content.get("classes") if container == FORMAT else None,
    )


def _find_weights(content: Any) -> tuple[str, dict[str, Tensor]]:
    """Where in a file the weights are ("" for the top), and they."""
    if not isinstance(content, Mapping):
        return "", {}
    for key in ("model", "state_dict", "teacher"):
        if isinstance(content.get(key), Mapping):
            weights = {name: torch.as_tensor(t) for name, t in content[key].items() if hasattr(t, "shape")}
            return FORMAT if content.get("format") == FORMAT else key, weights
    return "", {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def _rename(name: str, pairs: Iterable[tuple[str, str]]) -> str | None:
    """A name by the first pair whose left side it is or begins with; None by none."""
    for left, right in pairs:
        pattern = re.escape(left).replace(r"\{n\}", r"(?P<n>\d+)") + r"(?P<rest>\..+)?"
        if match := re.fullmatch(pattern, name):
            return right.replace("{n}", match.groupdict().get("n") or "") + (match["rest"] or "")
    return None


def _from_mmpretrain(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    probe = any(name.startswith("neck.bn.") for name in weights)
    heads = [pair for pair in MMPRETRAIN_HEADS if (pair[1] == "head.1") == probe]
    renamed = {_rename(name, (*MMPRETRAIN, *heads)): tensor for name, tensor in weights.items()}
    renamed.pop(None, None)
    return renamed


def _to_mmpretrain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    if "head.1.weight" in state:
        heads = MMPRETRAIN_HEADS[2:]
    else:
        heads = MMPRETRAIN_HEADS[1:2] if "fc_norm.weight" in state else MMPRETRAIN_HEADS[:1]
    pairs = [(ours, theirs) for theirs, ours in (*MMPRETRAIN, *heads)]
    renamed = {_rename(name, pairs): tensor for name, tensor in state.items()}
    renamed.pop(None, None)
    return renamed


# Loading


@dataclass
class LoadReport:
    """What went from a file into a model, and what did not."""

    path: Path
    dialect: str
    matched: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)  #: "name: from -> to"; they are matched too
    new: list[str] = field(default_factory=list)  #: of the model, expected to be in no file
    missing: list[str] = field(default_factory=list)  #: of the model, and should have been there
    unexpected: list[str] = field(default_factory=list)  #: of the file, and not of the model

    def __str__(self) -> str:
        lines = [f"loaded {len(self.matched)} tensors from {self.path} ({self.dialect})"]
        if self.resized:
            lines.append(f"resized: {', '.join(self.resized)}")
        if self.new:
            lines.append(f"new, not from the file: {grouped(self.new)}")
        if self.unexpected:
            lines.append(f"left in the file: {grouped(self.unexpected)}")
        if self.missing:
            lines.append(f"MISSING in the file, left as initialised: {grouped(self.missing)}")
        return "\n    ".join(lines)


def grouped(names: Iterable[str]) -> str:
    """Names by their first part, with counts."""
    counts = Counter(name.split(".")[0] for name in names)
    return ", ".join(f"{part} ({count})" if count > 1 else part for part, count in counts.items())


def load(model: nn.Module, path: str | os.PathLike, expected: tuple[str, ...] = ()) -> LoadReport:
    """Load a checkpoint of any dialect into a model with our names.

    Position tables are resized (bicubic, as timm does) to the model's `grid`, tables of relative positions linearly; a
    head for another number of classes stays in the file.

    Args:
        model: a `VisionTransformer`, or anything with its names and `grid`.
        path: the checkpoint.
        expected: parts of names that are new in this model, such as "head" or "rel_pos_h".

    Raises:
        UserError: the file holds no ViT, or one of other sizes.
    """
    found = read(path)
    own, state = model.state_dict(), dict(found.state)
    _check_sizes(model, own, found)
    report = LoadReport(found.path, found.dialect)
    for name, tensor in list(state.items()):
        if name not in own or tensor.shape == own[name].shape:
            continue
        fitted = None
        if name == "pos_embed":
            fitted = _fit_positions(tensor, own[name], model.grid, found.sizes)
        elif name.rpartition(".")[2] in ("rel_pos_h", "rel_pos_w") and tensor.shape[1] == own[name].shape[1]:
            fitted = F.interpolate(tensor.T[None].float(), len(own[name]), mode="linear")[0].T.to(tensor.dtype)
        elif name.split(".")[0] == "head":
            report.unexpected.append(name)
            del state[name]
            continue
        if fitted is None:
            shapes = f"{tuple(tensor.shape)} in the file, {tuple(own[name].shape)} in the model"
            raise UserError(f"{path} does not fit the model: {name} is {shapes}")
        report.resized.append(f"{name} {tuple(tensor.shape)} -> {tuple(fitted.shape)}")
        state[name] = fitted
    report.matched = [name for name in state if name in own]
    report.unexpected += [name for name in state if name not in own] + found.other
    for name in own:
        if name not in state:
            (report.new if set(expected) & set(name.split(".")) else report.missing).append(name)
    model.load_state_dict({name: state[name] for name in report.matched}, strict=False)
    return report


def _check_sizes(model: nn.Module, own: Mapping[str, Tensor], found: Checkpoint) -> None:
    if "patch_embed.proj.weight" not in own:
        raise UserError(f"{type(model).__name__} is no ViT of ours: nothing of {found.path} fits it")
    theirs, ours = found.sizes, {**sizes_of(own), "img_size": None}
    same = all(theirs[key] == ours[key] for key in ("embed_dim", "depth", "patch_size", "mlp_ratio"))
    if not same:
        raise UserError(
            f"{found.path} is a {describe({**theirs, 'img_size': None})}; the model a {describe(ours)}: choose a config"
            " of that encoder, or set model.network's sizes"
        )
    heads = getattr(model, "num_heads", theirs["num_heads"])
    if found.config and heads != theirs["num_heads"]:
        raise UserError(f"{found.path} was trained with {theirs['num_heads']} heads, the model has {heads}")


def _fit_positions(table: Tensor, own: Tensor, grid: tuple[int, int], sizes: Mapping) -> Tensor:
    """A position table (1, [1 +] L, D) on another grid, with or without the class token's row as `own` has it."""
    old = tuple(size // patch for size, patch in zip(sizes["img_size"], sizes["patch_size"], strict=True))
    length, prefix = old[0] * old[1], own.shape[1] - grid[0] * grid[1]
    if table.shape[1] not in (length, length + 1):
        raise UserError(f"a position table of {table.shape[1]} rows is none of {old[0]} x {old[1]} patches")
    patches = resample_abs_pos_embed(table[:, -length:].float(), grid, old, num_prefix_tokens=0).to(table.dtype)
    if not prefix:
        return patches
    return torch.cat([table[:, :1] if table.shape[1] > length else own[:, :1], patches], dim=1)


# Writing


def convert(path: str | os.PathLike, out: str | os.PathLike, to: str) -> list[str]:
    """Write a checkpoint in another dialect; returns the names that it leaves out.

    Args:
        path: a checkpoint of any dialect.
        out: .pth, or for timm also .safetensors.
        to: one of `DIALECTS`. Weights are the same to the last bit.
    """
    if to not in DIALECTS:
        raise UserError(f"unknown dialect {to!r}: {nearest(to, DIALECTS)}")
    out = Path(out)
    found = read(path)
    if out.exists() and out.samefile(path):
        raise UserError(f"{out} is the checkpoint itself: name another file")
    if out.suffix == ".safetensors" and to != "timm":
        raise UserError(f"{out}: .safetensors holds tensors only, {to} more: name a .pth")
    network = [name for name in found.state if name.split(".")[0] in ENCODER + CLASSIFIER]
    kept = list(found.state) if to in ("semaim", "mae") else network
    if to == "mae":  # its decoder, not SemAIM's
        kept = [name for name in kept if name in network or name.startswith(("decoder_", "mask_token"))]
    state = {name: found.state[name].contiguous() for name in kept}
    if to == "semaim":
        content = {"format": FORMAT, "version": __version__, "epoch": found.epoch, "classes": found.classes}
        content |= {"config": found.config, "model": state}
    elif to == "mae":
        content = {"model": state}
    elif to == "mmpretrain":
        content = {"meta": {"epoch": found.epoch}, "state_dict": _to_mmpretrain(state)}
    else:
        content = state
    if out.suffix == ".safetensors":
        _save_tensors(state, out)
    else:
        write_checkpoint(content, out)
    return [name for name in found.state if name not in kept] + found.other


def _save_tensors(state: dict[str, Tensor], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        save_file(state, partial, metadata={"format": "pt"})
        os.replace(partial, out)
    except Exception as error:  # safetensors raises an error of its own for a full disk
        raise UserError(f"cannot write {out}: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def export(path: str | os.PathLike, folder: str | os.PathLike) -> str:
    """Write model.safetensors and config.json, which `timm.create_model("local-dir:FOLDER", pretrained=True)` opens.

    A linear probe's batch normalisation goes into its head: W / sqrt(var + eps), and b less that times the mean.

    Returns:
        The architecture in timm.
    """
    found = read(path)
    sizes, folder = found.sizes, Path(folder)
    names = (*ENCODER, *CLASSIFIER)
    state = {name: tensor.contiguous() for name, tensor in found.state.items() if name.split(".")[0] in names}
    if "head.1.weight" in state:
        state = _fold_probe(state)
    average = "fc_norm.weight" in state or not any(name.startswith("norm.") for name in state)
    classes = len(state["head.weight"]) if "head.weight" in state else 0
    architecture = {"tiny": "vit_tiny", "small": "vit_small", "base": "vit_base", "large": "vit_large"}.get(
        next((n for n, s in SIZES.items() if all(sizes[key] == s[key] for key in s)), ""), ""
    )
    standard = architecture and sizes["patch_size"] == (16, 16) and sizes["mlp_ratio"] == 4
    model_args = {"img_size": sizes["img_size"], "global_pool": "avg" if average else "token"}
    if not standard:
        architecture = "vit_base"
        model_args |= {key: sizes[key] for key in ("embed_dim", "depth", "num_heads", "patch_size", "mlp_ratio")}
    if average:
        model_args["fc_norm"] = "fc_norm.weight" in state
    config = {
        "architecture": f"{architecture}_patch16_224",
        "num_classes": classes,
        "num_features": sizes["embed_dim"],
        "global_pool": model_args["global_pool"],
        "model_args": model_args,
        "pretrained_cfg": {
            "input_size": [3, *sizes["img_size"]],
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "mean": list(IMAGENET_DEFAULT_MEAN),
            "std": list(IMAGENET_DEFAULT_STD),
            "num_classes": classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    if found.classes:
        config["label_names"] = found.classes
    _save_tensors(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return config["architecture"]


def _fold_probe(state: dict[str, Tensor]) -> dict[str, Tensor]:
    scale = (state["head.0.running_var"].double() + 1e-6).rsqrt()
    weight = state["head.1.weight"].double() * scale
    bias = state["head.1.bias"].double() - weight @ state["head.0.running_mean"].double()
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    return {**kept, "head.weight": weight.float(), "head.bias": bias.float()}


def inspect(path: str | os.PathLike) -> str:
    """What a checkpoint is, and what our consumers take from it."""
    found = read(path)
    state, sizes = found.state, found.sizes
    encoder = [name for name in state if name.split(".")[0] in ENCODER]
    parts = [name for name in state if name not in encoder]
    told = found.config or any(
        (s["embed_dim"], s["depth"]) == (sizes["embed_dim"], sizes["depth"]) for s in SIZES.values()
    )
    maps = [name for name in encoder if name.split(".")[0] != "norm" and name != "cls_token"]
    rows = [
        ("file", f"{found.path}, {found.path.stat().st_size / 2**20:.1f} MiB"),
        ("dialect", found.dialect),
        ("encoder", describe(sizes)),
        ("heads", f"{sizes['num_heads']}" + ("" if told else " (a guess: 64 channels each)")),
        ("weights", f"{sum(state[name].numel() for name in encoder):,} in {len(encoder)} tensors"),
        ("epochs", "not told" if found.epoch is None else str(found.epoch)),
        ("beside it", grouped(parts) or "nothing"),
    ]
    if found.other:
        rows.append(("not read", grouped(found.other)))
    if head := next((name for name in ("head.weight", "head.1.weight") if name in state), None):
        rows.append(("classes", str(len(state[head]))))
    pooled = "class token" if "norm.weight" in state else "mean of the patches"
    rows += [
        (
            "classification",
            f"{len(encoder)} tensors of the encoder; the final norm only where the class token is pooled",
        ),
        ("detection", f"{len(maps)} tensors; not the class token, its row of the position table, the final norm"),
        ("segmentation", f"{len(maps) + 1} tensors; not the final norm"),
        ("k-NN, probes", f"{pooled}"),
    ]
    return "\n".join(f"{name:15} {value}" for name, value in rows)
