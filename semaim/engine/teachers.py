"""Frozen timm networks as guides: built by name, with weights from a file or the hub."""

from collections.abc import Sequence
from pathlib import Path

from timm import create_model
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import get_pretrained_cfg, is_model

from semaim.errors import UserError
from semaim.models import Teacher
from semaim.registry import MODELS


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
        name: in timm, such as vit_base_patch16_224.dino or vit_base_patch16_clip_quickgelu_224.openai. It determines
            how the network is built: the weights do not show which activation a CLIP has.
        weights: a local file (.safetensors, or .pth of tensors only) with timm's or OpenAI's names; None downloads them
            from the hub.
        project: pass the tokens through the network's head too, which is CLIP's projection to the space of texts.
        normalisation: of the teacher's images, "teacher" for that of its own training or "student" for `mean` and
            `std`.
        mean, std: statistics the student's images are normalised with, of pixels from 0 to 1.
    """
    if weights and not Path(weights).is_file():
        raise UserError(f"no such file of teacher weights: {weights}")
    check_activation(name, weights)
    overlay = {"file": weights} if weights else None
    try:
        network = create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, dynamic_img_size=True)
    except Exception as error:  # timm, the hub client and the network raise many types
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
    """`UserError` if timm would build a CLIP with exact GELU for weights trained with QuickGELU.

    timm records this for its own weights; for a local file, only the tag in `name` says whose weights they are.
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


setattr(build_teacher, "arguments_of", None)  # noqa: B010  # for the check of config keys
MODELS.register_module(name="Teacher", module=build_teacher)
