"""Writing a checkpoint in another dialect, or as a folder that timm opens."""

import json
import math
import os
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from semaim import __version__
from semaim.checkpoints import same_network
from semaim.checkpoints.dialects import MMPRETRAIN_BLOCK, from_mmpretrain, to_mmpretrain
from semaim.checkpoints.files import FORMAT, CannotSave, remove_partials, write_checkpoint
from semaim.checkpoints.loading import LoadReport, differences_of
from semaim.checkpoints.normalisation import Statistics
from semaim.checkpoints.reading import Checkpoint, read
from semaim.checkpoints.same_network import ENCODER
from semaim.checkpoints.sizes import grid_of, preset_of
from semaim.errors import UserError, nearest
from semaim.models.vit import SIZES

#: Parts of a classifier and of MAE's decoder besides the encoder; all else is a neck or a head of another task.
CLASSIFIER = ("fc_norm", "head")
MAE_DECODER = ("mask_token", "decoder_embed", "decoder_pos_embed", "decoder_blocks", "decoder_norm", "decoder_pred")
#: Dialects that `convert` writes -> their parts besides the encoder and the classifier ("*": all).
WRITTEN = {"semaim": "*", "timm": (), "mae": MAE_DECODER, "mmpretrain": MAE_DECODER}
DIALECTS = tuple(WRITTEN)
#: timm's plain ViTs, by published size and patch size.
TIMM = {(size, (16, 16)): f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")} | {
    ("huge", (14, 14)): "vit_huge_patch14_224"
}


def convert(path: str | os.PathLike, out: str | os.PathLike, to: str, partial: bool = False) -> list[str]:
    """Write a checkpoint in another dialect; returns the names it leaves out.

    Args:
        path: a checkpoint of any dialect.
        out: .pth, or for timm also .safetensors.
        to: one of `DIALECTS`. Weights are the same to the last bit.
        partial: of an encoder that differs from a plain ViT, write the parts that a plain ViT has.
    """
    if to not in DIALECTS:
        raise UserError(f"unknown dialect {to!r}: {nearest(to, DIALECTS)}")
    out = Path(out)
    found = read(path)
    if out.exists() and out.samefile(path):
        raise UserError(f"{out} is the checkpoint itself: name another file")
    if out.suffix == ".safetensors" and to != "timm":
        raise UserError(f"{out}: .safetensors holds tensors only, {to} more: name a .pth")
    report = plain_report(found, keeps_all=to == "semaim")
    if not partial:
        report.refuse()
    parts = (*ENCODER, *CLASSIFIER, *WRITTEN[to])
    state = {name: t.contiguous() for name, t in found.state.items() if "*" in parts or name.split(".")[0] in parts}
    if to != "semaim":
        state = {name: tensor for name, tensor in state.items() if name not in attentive_head(found.state)}
    content: dict[str, object]
    if to == "semaim":
        content = {"format": FORMAT, "version": __version__, "epoch": found.epoch, "classes": found.classes}
        content |= {"config": found.config, "model": state}
    elif to == "mae":
        content = {"model": state}
    elif to == "mmpretrain":
        foreign = to_mmpretrain(state)
        content = {"meta": {"epoch": found.epoch}, "state_dict": foreign}
        state = from_mmpretrain(foreign, "backbone.")[0]
    else:
        content = {**state}
    if to != "timm" and found.statistics:  # a bare dict of weights cannot hold them
        content["pretrained_cfg"] = {"mean": found.statistics.mean, "std": found.statistics.std}
    if out.suffix == ".safetensors":
        _save_tensors(state, out)
    else:
        try:
            write_checkpoint(content, out)
        except CannotSave as error:
            raise UserError(str(error).partition(";")[0]) from None  # no run to resume here
    return [name for name in found.state if name not in state] + found.skipped


def plain_report(found: Checkpoint, keeps_all: bool = False) -> LoadReport:
    """How a file's encoder differs from the plain ViT `VisionTransformer`; see `LoadReport.refuse`.

    Args:
        found: the file.
        keeps_all: its further tensors are kept too, so those that our dense backbones read are not lost.
    """
    blocks = (f"blocks.{n}.{part}" for n in range(found.sizes["depth"]) for _, part in MMPRETRAIN_BLOCK)
    own = ["cls_token", "pos_embed"]
    own += [f"{part}.{kind}" for part in ("patch_embed.proj", *blocks) for kind in ("weight", "bias")]
    dense = {"rel_pos_h", "rel_pos_w", *(same_network.DENSE if found.native else ())} if keeps_all else set()
    kept = {name for name in found.state if name.rpartition(".")[2] in dense}
    report = LoadReport(found.path, found.dialect)
    known = {*own, "norm.weight", "norm.bias"} | kept
    report.unread = same_network.unread(found.state, known, True, found.native) + found.unsupported
    if not keeps_all:
        report.unread += attentive_head(found.state)
    detector = any(name.endswith("rel_pos_h") for name in kept)  # it has no class token
    report.missing = [name for name in own if name not in found.state and not (detector and name == "cls_token")]
    report.differs = differences_of(found, None, "norm.weight" in found.state)
    return report


def attentive_head(state: dict[str, Tensor]) -> list[str]:
    """Names of the head of an attentive probe, which no other dialect has; empty for another head."""
    return [name for name in state if name.startswith("head.")] if "head.0.cls_token" in state else []


def _save_tensors(state: dict[str, Tensor], out: Path) -> None:
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_partials(out)
        # Copies: safetensors refuses tensors that share memory.
        save_file({name: tensor.clone() for name, tensor in state.items()}, partial, metadata={"format": "pt"})
        os.replace(partial, out)
    except Exception as error:  # safetensors has its own error type for a full disk
        raise UserError(f"cannot write {out}: {error}") from None
    finally:
        if partial.exists():
            partial.unlink()


def export(path: str | os.PathLike, folder: str | os.PathLike, partial: bool = False) -> str:
    """Write model.safetensors and config.json, which `timm.create_model("local-dir:FOLDER", pretrained=True)` opens.

    A linear probe's batch normalisation is folded into its head: W / sqrt(var + eps), and b minus that times the mean.

    Args:
        path: a checkpoint of any dialect.
        folder: created if absent.
        partial: leave out what the encoder has beyond a plain ViT.

    Returns:
        The architecture in timm.
    """
    found = read(path)
    sizes, folder = found.sizes, Path(folder)
    weights = folder / "model.safetensors"
    if weights.exists() and weights.samefile(path):
        raise UserError(f"{weights} is the checkpoint itself: name another folder")
    report = plain_report(found)
    if not partial:
        report.refuse()
    parts = (*ENCODER, *CLASSIFIER)
    kept = [name for name in found.state if name.split(".")[0] in parts and name not in report.unread]
    state = {name: found.state[name].contiguous() for name in kept}
    if "head.1.weight" in state:
        state = _fold_probe(state)
    if "fc_norm.weight" in state:  # then nothing reads `norm`
        state = {name: tensor for name, tensor in state.items() if not name.startswith("norm.")}
    average = "norm.weight" not in state
    classes = len(state["head.weight"]) if "head.weight" in state else 0
    preset = preset_of(sizes) or ""  # "" is in no table here
    architecture = TIMM.get((preset, sizes["patch_size"]))
    model_args = {"img_size": sizes["img_size"], "global_pool": "avg" if average else "token"}
    if not architecture or sizes["mlp_ratio"] != 4 or sizes["num_heads"] != SIZES[preset]["num_heads"]:
        architecture = "vit_base_patch16_224"
        model_args |= {key: sizes[key] for key in ("embed_dim", "depth", "num_heads", "patch_size", "mlp_ratio")}
    if state.get("pos_embed") is not None and state["pos_embed"].shape[1] == math.prod(grid_of(sizes)):
        model_args["no_embed_class"] = True
    if average:
        model_args["fc_norm"] = model_args["final_norm"] = "fc_norm.weight" in state
    _check_timm(found.path, state, architecture, classes, model_args)
    statistics = found.statistics or Statistics()
    config = {
        "architecture": architecture,
        "num_classes": classes,
        "num_features": sizes["embed_dim"],
        "global_pool": model_args["global_pool"],
        "model_args": model_args,
        "pretrained_cfg": {
            "input_size": [3, *sizes["img_size"]],
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "mean": list(statistics.mean),
            "std": list(statistics.std),
            "num_classes": classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    if found.classes:
        config["label_names"] = found.classes
    _save_tensors(state, weights)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return architecture


def _check_timm(path: Path, state: dict[str, Tensor], architecture: str, classes: int, model_args: dict) -> None:
    """`UserError` if timm's model has different weights."""
    if not model_args["img_size"]:
        raise UserError(f"{path} has no position table: timm's ViT needs one")
    with torch.device("meta"):  # names and shapes take no memory
        expected = timm.create_model(architecture, num_classes=classes, **model_args).state_dict()
    wrong = {
        "lacks": [name for name in expected if name not in state],
        "has besides": [name for name in state if name not in expected],
        "has in other shapes": [
            name for name in state if name in expected and state[name].shape != expected[name].shape
        ],
    }
    found = "; ".join(f"{what} {', '.join(names[:3])}" for what, names in wrong.items() if names)
    if found:
        raise UserError(f"{path} is no plain ViT of timm's: it {found}")


def _fold_probe(state: dict[str, Tensor]) -> dict[str, Tensor]:
    scale = (state["head.0.running_var"].double() + 1e-6).rsqrt()
    weight = state["head.1.weight"].double() * scale
    bias = state["head.1.bias"].double() - weight @ state["head.0.running_mean"].double()
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    return {**kept, "head.weight": weight.float(), "head.bias": bias.float()}
