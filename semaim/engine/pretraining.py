"""SemAIM under mmengine's runner: builds the network from a config, normalises on the device, sets the precision."""

from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.registry import DATASETS, MODELS
from timm import create_model
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from semaim.data.folder import PretrainImages
from semaim.errors import UserError
from semaim.models import FeatureTarget, PixelTarget, SemAIM, Teacher
from semaim.models.vit import Block

DATASETS.register_module(module=PretrainImages)


def build_teacher(name: str, weights: str | None = None, project: bool = False) -> Teacher:
    """A frozen timm model as guide.

    Args:
        name: in timm, such as vit_base_patch16_224.dino or vit_base_patch16_clip_224.openai.
        weights: a local file (.safetensors, or .pth of tensors only); None fetches them from the hub.
        project: also pass tokens through the model's head (CLIP).
    """
    if weights and not Path(weights).is_file():
        raise UserError(f"no such file of teacher weights: {weights}")
    overlay = {"file": weights} if weights else None
    try:
        network = create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, dynamic_img_size=True)
    except Exception as error:  # timm, the hub client and the network each raise their own
        cause = str(error).strip().splitlines()[0][:100] if str(error).strip() else type(error).__name__
        if weights:
            raise UserError(f"cannot load teacher {name} from {weights}: {cause}") from None
        raise UserError(
            f"cannot fetch the weights of teacher {name} ({cause}); download model.safetensors of timm/{name} from the"
            " Hugging Face hub elsewhere and give it: --cfg-options model.network.guide.weights=FILE"
        ) from None
    try:
        return Teacher(network, project)
    except ValueError as error:
        raise UserError(f"teacher {name}: {error}") from None


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
        target = dict(target)
        kind = target.pop("type")
        if kind == "PixelTarget":
            patch = kwargs.get("patch_size", 16)
            built = PixelTarget((patch, patch) if isinstance(patch, int) else patch, **target)
        else:
            built = FeatureTarget(guide.width if isinstance(guide, Teacher) else None, **target)
        network = SemAIM(built, guide=guide, **kwargs)
    except (ValueError, TypeError) as error:
        raise UserError(f"model.network: {error}") from None
    return network


#: What a config's `type` names, and whose arguments it takes.
build_semaim.arguments_of = SemAIM
build_teacher.arguments_of = None
MODELS.register_module(name="SemAIM", module=build_semaim)
MODELS.register_module(name="Teacher", module=build_teacher)
MODELS.register_module(module=PixelTarget)
MODELS.register_module(module=FeatureTarget)


@MODELS.register_module()
class NormaliseImages(BaseDataPreprocessor):
    """Moves a batch to the device and turns uint8 images into normalised floats there: a quarter of the traffic."""

    def __init__(self, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD):
        super().__init__(non_blocking=True)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1) * 255, persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float (B, 3, H, W), normalised."""
        return (images.float() - self.mean) / self.std

    def denormalise(self, images: Tensor) -> Tensor:
        """Inverse of `normalise`, as floats in [0, 1]."""
        return ((images * self.std + self.mean) / 255).clamp(0, 1)

    def forward(self, data: dict, training: bool = False) -> dict:
        """dict of image uint8 (B, 3, H, W) and draw (B, L) -> dict of images, normalised, and draw, on the device."""
        data = self.cast_data(data)
        return {"images": self.normalise(data["image"]), "draw": data["draw"]}


@MODELS.register_module()
class Pretraining(BaseModel):
    """A pretraining network as mmengine trains it.

    Checkpoints hold the state of `network`, so its parameter names have no prefix.

    Args:
        network: config of a network whose forward(images, draw) gives an output with a `loss`.
        precision: "bf16" (autocast on a GPU; a CPU computes in fp32 all the same) or "fp32".
        compile: compile the blocks with torch.compile; takes minutes on a CPU.
    """

    def __init__(self, network: dict, precision: str = "bf16", compile: bool = False):
        super().__init__(data_preprocessor={"type": "NormaliseImages"})
        if precision not in ("bf16", "fp32"):
            raise UserError(f"model.precision {precision!r} is unknown: choose bf16 or fp32")
        self.network: nn.Module = MODELS.build(network)
        self.precision = precision
        if compile:
            for module in self.network.modules():
                if isinstance(module, Block):
                    module.compile()

    def init_weights(self) -> None:
        """The network initialises itself when it is built."""

    def autocast(self, device: torch.device) -> torch.autocast:
        """bf16 on a GPU, where asked for; nothing elsewhere."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16" and device.type == "cuda")

    def forward(self, images: Tensor, draw: Tensor, mode: str = "loss") -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) and draw (B, L) -> dict of the scalar loss."""
        with self.autocast(images.device):
            return {"loss": self.network(images, draw).loss}


def model_from_checkpoint(checkpoint: dict, options: dict | None = None) -> Pretraining:
    """The model of a checkpoint of `checkpointing.read_checkpoint`, with its weights, in eval mode.

    The config in the file is data from elsewhere: it names sizes and options, never what else to build.

    Args:
        checkpoint: with the run's `config` and `model`.
        options: keys of the config to change, as `--cfg-options` gives them.
    """
    cfg = Config({"model": checkpoint["config"]["model"]})
    cfg.merge_from_dict(options or {})
    model = cfg.model.to_dict()
    kinds = (model.pop("type", None), model.get("network", {}).get("type"))
    if kinds != ("Pretraining", "SemAIM"):
        raise UserError(f"the checkpoint's config builds {kinds[0]} of {kinds[1]}, not SemAIM pretraining")
    try:
        built = Pretraining(**{**model, "compile": False})
        built.network.load_state_dict(checkpoint["model"])
    except (TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the checkpoint's config and weights do not fit: {reason}") from None
    return built.eval()
