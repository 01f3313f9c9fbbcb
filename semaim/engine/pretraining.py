"""Pretraining networks of any method under mmengine's runner, built from a config."""

from collections.abc import Sequence
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from torch import Tensor, nn

from semaim.checkpoints.normalisation import Statistics, of_run
from semaim.data.folder import PretrainImages
from semaim.engine.config import merge
from semaim.engine.config_keys import Types, check_options
from semaim.engine.network import NetworkModel
from semaim.errors import UserError, nearest
from semaim.models import FeatureTarget, PixelTarget
from semaim.registry import MODELS, SCOPE, method_of, methods

DATASETS.register_module(module=PretrainImages)
MODELS.register_module(module=PixelTarget)
MODELS.register_module(module=FeatureTarget)


def build_target(target: dict, patch_size: int | tuple[int, int], guide_width: int | None = None) -> Any:
    """Build a target from dict(type=..., ...), filling in the patch size and the width of the guide's tokens."""
    target = dict(target)
    kind = MODELS.get(target.pop("type"))
    if kind is FeatureTarget:
        return FeatureTarget(guide_width, **target)
    return kind(to_2tuple(patch_size), **target)


def build_network(network: dict) -> nn.Module:
    """A method's network from its config; `UserError` for wrong values."""
    method = method_of(network)
    if method is None or method.network is None:
        named = [name for name, it in methods().items() if it.network]
        raise UserError(f"model.network.type is {network.get('type')!r}: {nearest(str(network.get('type')), named)}")
    try:
        return method.build(**{key: value for key, value in network.items() if key != "type"})
    except (ValueError, TypeError) as error:
        raise UserError(f"model.network: {error}") from None


@MODELS.register_module()
class Pretraining(NetworkModel):
    """A pretraining network as mmengine trains it: its forward(images, draw) gives an output with a `loss`.

    Args:
        network: config of the network; its `type` names the method.
        precision, cpu_precision: as for `NetworkModel`.
        mean, std: for normalising images, of the three channels of pixels from 0 to 1; None for ImageNet's.
    """

    def __init__(
        self,
        network: dict,
        precision: str = "bf16",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        cpu_precision: str = "fp32",
    ):
        statistics = {"mean": mean or IMAGENET_DEFAULT_MEAN, "std": std or IMAGENET_DEFAULT_STD}
        if isinstance(network.get("guide"), dict):  # it sees the same images
            network = {**network, "guide": {**network["guide"], **statistics}}
        preprocessor = {"type": "NormaliseImages", **statistics}
        super().__init__(build_network(network), precision, preprocessor, cpu_precision=cpu_precision)
        method = method_of(network)
        assert method is not None  # `build_network` has refused others
        self.method = method

    def describe(self) -> str:
        """What is predicted, and how, in one line."""
        return f"{type(self.network).__name__}: {self.method.describe(self.network)}"

    def forward(self, images: Tensor, draw: Tensor, mode: str = "loss") -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) and draw (B, L) -> dict of the scalar loss."""
        with self.autocast(images.device):
            return {"loss": self.network(images, draw).loss}


def model_from_checkpoint(checkpoint: dict, options: dict | None = None) -> Pretraining:
    """The model of a checkpoint from `files.read_checkpoint`, with its weights, in eval mode.

    The config in the file is not trusted: it gives sizes and options, but cannot name other things to build.

    Args:
        checkpoint: with the run's `config`, which has the statistics of its images, and `model`.
        options: config keys to change, as for `--cfg-options`.
    """
    if not checkpoint.get("config"):
        raise UserError("the checkpoint holds weights without a config: only those of a pretraining run can be drawn")
    cfg = Config({"model": checkpoint["config"]["model"]})
    if options:
        check_options(cfg, options, ("model",), Types(SCOPE))
        merge(cfg, options)
    model = cfg.model.to_dict()
    kind, network = model.pop("type", None), model.get("network", {})
    if kind != "Pretraining" or method_of(network) is None:
        known = " or ".join(name for name, method in methods().items() if method.network)
        raise UserError(f"the checkpoint's config builds {kind} of {network.get('type')}, not pretraining by {known}")
    statistics = of_run(checkpoint["config"]) or Statistics()
    try:
        built = Pretraining(**{**model, "mean": statistics.mean, "std": statistics.std})
        built.network.load_state_dict(checkpoint["model"])
    except (TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the checkpoint's config and weights do not fit: {reason}") from None
    return built.eval()
