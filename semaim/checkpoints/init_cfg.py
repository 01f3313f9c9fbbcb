"""`init_cfg` for our backbones: under mmdet's and mmseg's own runners they start from any checkpoint."""

from collections.abc import Mapping
from typing import Any

from mmengine.logging import print_log
from torch import nn

from semaim.checkpoints.consumers import load_backbone
from semaim.checkpoints.reading import read
from semaim.errors import UserError

KEYS = {"type", "checkpoint", "allow_partial"}


class InitFromCheckpoint(nn.Module):
    """Mixin for backbones: takes `init_cfg`, and loads its checkpoint when mmengine initialises the weights.

    Args:
        init_cfg: dict(type="Pretrained", checkpoint=FILE), FILE in any dialect; `allow_partial=True` loads what fits of
            an encoder that differs from the backbone. None for random weights.

    Attributes:
        scope: mmdet or mmseg: a trained model of the other is not accepted as a pretrained encoder.
    """

    scope: str

    def __init__(self, *args, init_cfg: Mapping[str, Any] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.init_cfg = init_cfg and checked(init_cfg)

    def init_weights(self) -> None:
        """Load the checkpoint and log the report; `UserError` if its encoder is a different network."""
        if not self.init_cfg:
            return
        found = read(self.init_cfg["checkpoint"])
        report = load_backbone(self, found, self.scope, self.init_cfg.get("allow_partial", False))
        print_log(str(report), logger="current")
        if found.statistics:
            mean, std = found.statistics.scaled(255)
            print_log(
                f"it was trained on images of mean {mean} and std {std}: set them in model.data_preprocessor", "current"
            )


def checked(init_cfg: Any) -> dict:
    """An `init_cfg` as a dict; `UserError` if it names no checkpoint or has unknown keys."""
    known = isinstance(init_cfg, Mapping) and init_cfg.get("type") == "Pretrained" and init_cfg.get("checkpoint")
    if not known or set(init_cfg) - KEYS:
        raise UserError(
            f"model.backbone.init_cfg is {init_cfg!r}: give dict(type='Pretrained', checkpoint=FILE), with"
            " allow_partial=True for what fits of another network's encoder"
        )
    return dict(init_cfg)
