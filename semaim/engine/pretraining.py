"""Pretraining networks, SemAIM and MAE, under mmengine's runner: built from a config, with their teachers."""

from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS
from timm import create_model
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from timm.models import get_pretrained_cfg, is_model
from torch import Tensor

from semaim.checkpoints.normalisation import Statistics, of_run
from semaim.data.folder import PretrainImages
from semaim.engine.config import merge
from semaim.engine.config_keys import Types, check_options
from semaim.engine.network import NetworkModel
from semaim.errors import UserError
from semaim.models import MAE, FeatureTarget, PixelTarget, SemAIM, Teacher

DATASETS.register_module(module=PretrainImages)


def build_teacher(
    name: str,
    weights: str | None = None,
    project: bool = False,
    normalisation: str = "teacher",
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> Teacher:
    """A frozen timm model as guide.

    Args:
        name: in timm, such as vit_base_patch16_224.dino or vit_base_patch16_clip_quickgelu_224.openai. It says how the
            network is built: which activation a CLIP has is not seen in its weights.
        weights: a local file (.safetensors, or .pth of tensors only), of timm's or OpenAI's names; None fetches them
            from the hub.
        project, normalisation, mean, std: as for `Teacher`.
    """
    if weights and not Path(weights).is_file():
        raise UserError(f"no such file of teacher weights: {weights}")
    check_activation(name, weights)
    overlay = {"file": weights} if weights else None
    try:
        network = create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, dynamic_img_size=True)
    except Exception as error:  # timm, the hub client and the network each raise their own
        cause = str(error).strip().splitlines()[0][:100] if str(error).strip() else type(error).__name__
        if weights:
            raise UserError(f"cannot load teacher {name} from {weights}: {cause}") from None
        known = get_pretrained_cfg(name)
        hub = (known and known.hf_hub_id) or f"timm/{name}"
        raise UserError(
            f"cannot fetch the weights of teacher {name} ({cause}); download model.safetensors of {hub} from the"
            " Hugging Face hub elsewhere and give it: --cfg-options model.network.guide.weights=FILE"
        ) from None
    try:
        return Teacher(network, project, tuple(mean), tuple(std), normalisation)
    except ValueError as error:
        raise UserError(f"teacher {name}: {error}") from None


def check_activation(name: str, weights: str | None = None) -> None:
    """`UserError` where timm would build a CLIP with the exact GELU around weights trained with QuickGELU.

    timm says of each of its weights whether they are; of a local file only its tag in the name tells whose they are.
    """
    architecture, _, tag = name.partition(".")
    quick = architecture.replace("_clip_", "_clip_quickgelu_")
    if quick == architecture or not is_model(quick):
        return
    known = get_pretrained_cfg(name)
    if known and any("natively QuickGELU" in note for note in known.notes or ()):
        raise UserError(
            f"teacher {name} would be built with GELU, and its weights were trained with QuickGELU:"
            f" use {quick}.{known.tag}"
        )
    if weights and not tag:
        raise UserError(
            f"teacher {name}: its name does not say whose weights {weights} holds, and so not their activation: name"
            f" {quick} for OpenAI's, or add the tag of others ({name}.{known.tag if known else 'TAG'})"
        )


def build_target(target: dict, patch_size: int | tuple[int, int], guide_width: int | None = None):
    """A `PixelTarget` or `FeatureTarget` from dict(type=..., ...)."""
    target = dict(target)
    kind = target.pop("type")
    if kind == "PixelTarget":
        return PixelTarget(to_2tuple(patch_size), **target)
    return FeatureTarget(guide_width, **target)


def build_semaim(target: dict, guide: str | dict = "online", **kwargs) -> SemAIM:
    """A `SemAIM` from plain values.

    Args:
        target: dict(type="PixelTarget", ...) or dict(type="FeatureTarget").
        guide: "online", "ema", or dict(type="Teacher", name=..., ...).
        **kwargs: of `SemAIM` and of its encoder.
    """
    try:
        if isinstance(guide, dict):
            guide = build_teacher(**{k: v for k, v in guide.items() if k != "type"})
        width = guide.width if isinstance(guide, Teacher) else None
        return SemAIM(build_target(target, kwargs.get("patch_size", 16), width), guide=guide, **kwargs)
    except (ValueError, TypeError) as error:
        raise UserError(f"model.network: {error}") from None


def build_mae(target: dict, **kwargs) -> MAE:
    """A `MAE` from plain values: target as dict(type="PixelTarget", ...), and its arguments and the encoder's."""
    try:
        return MAE(build_target(target, kwargs.get("patch_size", 16)), **kwargs)
    except (ValueError, TypeError) as error:
        raise UserError(f"model.network: {error}") from None


#: What a config's `type` names, and whose arguments it takes.
build_semaim.arguments_of = SemAIM
build_mae.arguments_of = MAE
build_teacher.arguments_of = None
MODELS.register_module(name="SemAIM", module=build_semaim)
MODELS.register_module(name="MAE", module=build_mae)
MODELS.register_module(name="Teacher", module=build_teacher)
MODELS.register_module(module=PixelTarget)
MODELS.register_module(module=FeatureTarget)


@MODELS.register_module()
class Pretraining(NetworkModel):
    """A pretraining network as mmengine trains it: its forward(images, draw) gives an output with a `loss`.

    Args:
        network, precision, compile: as for `NetworkModel`.
        mean, std: that images are normalised with, of the three channels of pixels from 0 to 1; None for ImageNet's.
    """

    def __init__(
        self,
        network: dict,
        precision: str = "bf16",
        compile: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        statistics = {"mean": mean or IMAGENET_DEFAULT_MEAN, "std": std or IMAGENET_DEFAULT_STD}
        if isinstance(network.get("guide"), dict):  # it sees the same images
            network = {**network, "guide": {**network["guide"], **statistics}}
        super().__init__(network, precision, compile, data_preprocessor={"type": "NormaliseImages", **statistics})

    def describe(self) -> str:
        """What is predicted, and how, in a line."""
        network = self.network
        how = (
            f"mask ratio {network.mask_ratio:g}"
            if isinstance(network, MAE)
            else f"order {network.order}, guide {network.guide if isinstance(network.guide, str) else 'teacher'}"
        )
        return f"{type(network).__name__}: {how}; target {type(network.target).__name__}"

    def forward(self, images: Tensor, draw: Tensor, mode: str = "loss") -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) and draw (B, L) -> dict of the scalar loss."""
        with self.autocast(images.device):
            return {"loss": self.network(images, draw).loss}


def model_from_checkpoint(checkpoint: dict, options: dict | None = None) -> Pretraining:
    """The model of a checkpoint of `files.read_checkpoint`, with its weights, in eval mode.

    The config in the file is data from elsewhere: it names sizes and options, never what else to build.

    Args:
        checkpoint: with the run's `config`, which has the statistics of its images, and `model`.
        options: keys of the config to change, as `--cfg-options` gives them.
    """
    if not checkpoint.get("config"):
        raise UserError("the checkpoint holds weights without a config: only those of a pretraining run can be drawn")
    cfg = Config({"model": checkpoint["config"]["model"]})
    if options:
        check_options(cfg, options, ("model",), Types())
        merge(cfg, options)
    model = cfg.model.to_dict()
    kinds = (model.pop("type", None), model.get("network", {}).get("type"))
    if kinds not in (("Pretraining", "SemAIM"), ("Pretraining", "MAE")):
        raise UserError(f"the checkpoint's config builds {kinds[0]} of {kinds[1]}, not SemAIM pretraining or MAE's")
    statistics = of_run(checkpoint["config"]) or Statistics()
    try:
        built = Pretraining(**{**model, "compile": False, "mean": statistics.mean, "std": statistics.std})
        built.network.load_state_dict(checkpoint["model"])
    except (TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the checkpoint's config and weights do not fit: {reason}") from None
    return built.eval()
