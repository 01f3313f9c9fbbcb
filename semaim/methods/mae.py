"""MAE, the baseline: the network is `semaim.models.mae`."""

from typing import Any

from semaim.engine.pretraining import build_target
from semaim.models import MAE
from semaim.registry import METHODS, Method, Variant


@METHODS.register_module(name="MAE")
class MAEMethod(Method):
    """Most patches are removed; a small decoder predicts their pixels from the others."""

    network = MAE
    place = 1
    variants = {
        "mae": Variant(
            {
                "pretrain": {
                    "quick": "semaim/configs/pretrain/mae_vit_tiny_scenes_easy.py",
                    "study": "semaim/configs/pretrain/mae_vit_tiny_cifar10.py",
                    "paper": "semaim/configs/pretrain/mae_vit_base_1600e.py",
                },
                "linear": {"paper": "semaim/configs/linear/vit_base_90e_mae.py"},  # its own published protocol
                "detection": {"paper": "mmdet_configs/mae_mask_rcnn.py"},
                "segmentation": {"paper": "mmseg_configs/mae_upernet.py"},
            },
            compared=True,
        )
    }
    words = {frozenset({"mae"}): "MAE"}

    @classmethod
    def build(cls, *, target: dict, **arguments: Any) -> MAE:
        """Target as dict(type="PixelTarget", ...)."""
        return MAE(build_target(target, arguments.get("patch_size", 16)), **arguments)

    @staticmethod
    def describe(network: MAE) -> str:
        """The mask ratio, and the target."""
        return f"mask ratio {network.mask_ratio:g}; target {type(network.target).__name__}"
