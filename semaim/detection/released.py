"""Reading the files of detectron2's whole ViTDet detectors for our models, and converting them to our names."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from semaim.checkpoints.files import CannotSave, write_checkpoint
from semaim.checkpoints.safe_reading import read_file
from semaim.detection.detectron2_names import INERT, to_ours
from semaim.errors import UserError


def weights_of(content: Any, path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a detectron2 file, a .pkl of arrays or a .pth from its training, under its names.

    Raises:
        UserError: it contains no whole detector, or a weight is not a tensor.
    """
    held = content.get("model") if isinstance(content, Mapping) else None
    held = held if isinstance(held, Mapping) else {}
    if not any(str(name).startswith("proposal_generator.") for name in held):
        raise UserError(f"{path} holds no whole detector of detectron2: it has no proposal_generator (the RPN)")
    weights = {name: torch.as_tensor(v) if isinstance(v, np.ndarray) else v for name, v in held.items()}
    if wrong := [str(name) for name, value in weights.items() if not isinstance(value, Tensor)]:
        raise UserError(f"{path}: {wrong[0]} is no tensor")
    return weights


def foreign_weights(content: Any, model: nn.Module, path: str | os.PathLike) -> dict[str, Tensor] | None:
    """`for_model` of a detectron2 file; None for any other file."""
    held = content.get("model") if isinstance(content, Mapping) else None
    if not isinstance(held, Mapping) or not any(str(name).startswith("proposal_generator.") for name in held):
        return None
    return for_model(content, model, path)


def for_model(content: Any, model: nn.Module, path: str | os.PathLike) -> dict[str, Tensor]:
    """The weights of a detectron2 file under the names of our detector; `UserError` for other pixel statistics.

    Args:
        content: of the file, from `safe_reading.read_file`.
        model: the detector, whose preprocessor has statistics of RGB pixels from 0 to 255.
        path: of the file, for error messages.
    """
    weights = weights_of(content, path)
    for theirs, ours in (("pixel_mean", "mean"), ("pixel_std", "std")):
        if theirs in weights:
            there, here = (t.flatten().float().cpu() for t in (weights[theirs], getattr(model.data_preprocessor, ours)))
            if there.shape != here.shape or not torch.allclose(there, here, rtol=1e-5, atol=0):
                raise UserError(
                    f"{path} has {theirs} {as_text(there)}, the config's model.data_preprocessor.{ours} is"
                    f" {as_text(here)}: set its mean and std with --cfg-options, if the file's images were RGB"
                )
    return to_ours(weights)


def as_text(values: Tensor) -> str:
    """Numbers as a list in a message."""
    return "[" + ", ".join(f"{value:.6g}" for value in values.tolist()) + "]"


def convert(path: str | os.PathLike, out: str | os.PathLike) -> list[str]:
    """Write a whole detector under our names in mmdet's format: {"state_dict": ..., "meta": ...}.

    Args:
        path: detectron2's file. out: .pth.

    Returns:
        Names of the buffers left out: pixel statistics, which the preprocessor has, and anchors, which are generated.
    """
    out = Path(out)
    if out.suffix == ".safetensors":
        raise UserError(f"{out}: .safetensors holds only tensors, mmdet's files more: name a .pth")
    if out.exists() and out.samefile(path):
        raise UserError(f"{out} is the checkpoint itself: name another file")
    weights = weights_of(read_file(path), path)
    try:
        write_checkpoint({"meta": {}, "state_dict": {n: t.contiguous() for n, t in to_ours(weights).items()}}, out)
    except CannotSave as error:
        raise UserError(str(error).partition(";")[0]) from None  # no run to resume here
    return [name for name in weights if INERT.fullmatch(name)]
