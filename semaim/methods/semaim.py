"""SemAIM, and the orders it is compared with: SAIM's random one, raster, similarity; pixels or features as target.

The network is `semaim.models.semaim`: start there.
"""

from collections.abc import Mapping
from typing import Any

from semaim.engine.pretraining import build_target
from semaim.engine.teachers import build_teacher
from semaim.models import SemAIM, Teacher
from semaim.registry import METHODS, Method, Variant

CONFIGS = "semaim/configs/pretrain"
PIXELS = {
    "quick": f"{CONFIGS}/semaim_vit_tiny_scenes_easy.py",
    "study": f"{CONFIGS}/semaim_vit_tiny_cifar10.py",
    "paper": f"{CONFIGS}/semaim_vit_base_800e.py",
}
FEATURES = {
    "quick": f"{CONFIGS}/semaim_ema_vit_tiny_scenes_easy.py",
    "study": f"{CONFIGS}/semaim_ema_vit_tiny_cifar10.py",
    "paper": f"{CONFIGS}/semaim_ema_vit_base_800e.py",
}
ORDERS = {"semaim": "semantic", "saim": "stochastic", "raster": "raster", "similarity": "similarity"}
#: What published.yaml calls the method of an order; "order NAME" where nothing is published.
TITLES = {"semantic": "SemAIM", "stochastic": "SAIM", "raster": "raster order"}


def _variant(name: str, configs: Mapping[str, str], **more) -> Variant:
    """A config of SemAIM's with another order."""
    option = {"model.network.order": ORDERS[name]}
    changed = {scale: option for scale, path in configs.items() if ORDERS[name] != "semantic"}
    own = {"saim": "saim_vit_base_800e.py", "raster": "raster_vit_base_800e.py"}.get(name)
    if own and configs is PIXELS:  # it has its own config, which sets the order
        configs, changed = {**configs, "paper": f"{CONFIGS}/{own}"}, {**changed, "paper": {}}
    return Variant({"pretrain": configs}, changed, centre=name in ("semaim", "similarity"), **more)


@METHODS.register_module(name="SemAIM")
class SemAIMMethod(Method):
    """Patches are predicted one after another, in an order that the image itself determines."""

    network = SemAIM
    place = 0
    picture = "order"
    variants = {
        "semaim": _variant("semaim", PIXELS, compared=True, quick=True),
        "saim": _variant("saim", PIXELS, compared=True),
        "raster": _variant("raster", PIXELS, compared=True),
        "similarity": _variant("similarity", PIXELS),
        "semaim-ema": _variant("semaim", FEATURES),
        "similarity-ema": _variant("similarity", FEATURES),
        "saim-ema": _variant("saim", FEATURES),
        "raster-ema": _variant("raster", FEATURES),
    }
    words = {
        frozenset({"semaim", "clip"}): "SemAIM*",
        frozenset({"semaim", "dino"}): "SemAIM, DINO features",
        frozenset({"semaim", "ema"}): "SemAIM, EMA features",
        frozenset({"semaim"}): "SemAIM",
        frozenset({"saim"}): "SAIM",
        frozenset({"raster"}): "raster order",
    }

    @classmethod
    def build(cls, *, target: dict, guide: str | dict = "online", **arguments: Any) -> SemAIM:
        """Target and guide as dict(type=..., ...); guide also "online" or "ema"."""
        settings = {} if isinstance(guide, str) else {key: value for key, value in guide.items() if key != "type"}
        by: str | Teacher = guide if isinstance(guide, str) else build_teacher(**settings)
        width = by.width if isinstance(by, Teacher) else None
        return SemAIM(build_target(target, arguments.get("patch_size", 16), width), guide=by, **arguments)

    @staticmethod
    def describe(network: SemAIM) -> str:
        """Order, guide and target."""
        guide = network.guide if isinstance(network.guide, str) else "teacher"
        return f"order {network.order}, guide {guide}; target {type(network.target).__name__}"

    @classmethod
    def title(cls, config: Mapping) -> str:
        """By the order; features, guides and similarities are added if they differ from the paper's."""
        order, guide = config.get("order", "semantic"), config.get("guide", "online")
        settings = guide if isinstance(guide, Mapping) else {}
        teacher = str(settings.get("name", ""))
        features = {"online": "own", "ema": "EMA"}.get(guide, teacher) if isinstance(guide, str) else teacher
        features = "DINO" if teacher.endswith(".dino") else "CLIP" if "_clip_" in teacher else features
        # The published setting is OpenAI's CLIP on images with ImageNet's statistics. Earlier versions had neither.
        official = "_quickgelu_" in teacher and settings.get("normalisation") == "student"
        parts = [TITLES.get(order, f"order {order}")]
        target = config.get("target")
        if isinstance(target, Mapping) and target.get("type") == "FeatureTarget":
            parts.append(f"{features} features")
        elif guide != "online":
            parts.append(f"guide {features}")
        if config.get("similarity", "cls") != "cls":
            parts.append(f"similarity {config['similarity']}")
        return "SemAIM*" if official and parts == ["SemAIM", "CLIP features"] else ", ".join(parts)
