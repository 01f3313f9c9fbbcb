"""docs/recipes.md: every number of every shipped config, every number that stands in the code, every difference."""

import ast
import re
from inspect import signature

import pytest
import torch
from mmengine.registry import LOOPS, OPTIM_WRAPPER_CONSTRUCTORS
from recipes import PAGE, ROOT, configs, differences, documented, resolved
from torch import nn

import semaim.tasks  # noqa: F401  registers what configs name
from semaim.data.folder import PretrainImages
from semaim.data.labelled import evaluation_transform, training_transform
from semaim.engine import attentive, features
from semaim.engine.config import load_config
from semaim.engine.schedule import cosine_with_warmup, plan_batch
from semaim.models import PixelTarget
from semaim.models.attentive import attentive_head
from semaim.models.targets import ema_decay
from semaim.models.vit import SIZES
from semaim.parity.deviations import as_table, read_deviations
from semaim.registry import build_model

FINETUNE = "semaim/configs/finetune/vit_base_100e.py"
LARS = "semaim/configs/linear/vit_base_90e_mae.py"
PRETRAIN = "semaim/configs/pretrain/semaim_vit_base_800e.py"
ATTENTIVE = "semaim/configs/attentive/vit_base_90e.py"
PROBE = "semaim/configs/linear/vit_base_90e.py"
TINY = dict(embed_dim=64, num_heads=2, depth=2, img_size=32)


def section(title: str) -> str:
    """The text of a section of the page."""
    return re.split(r"^## ", PAGE.read_text().split(f"\n## {title}\n")[1], flags=re.M)[0]


def rows(title: str) -> dict[str, str]:
    """First column -> second of a section's table, without the marks of code."""
    cells = (line.split("|") for line in section(title).splitlines() if line.startswith("| `"))
    return {one.strip().strip("`"): two.strip().strip("`") for _, one, two, *_ in cells}


def test_the_page_has_every_config():
    assert {name for name in documented() if "/_base_/" not in name} == set(configs())


@pytest.mark.parametrize("folder", ["semaim/configs", "mmdet_configs", "mmseg_configs"])
def test_every_config_is_what_the_page_says(folder):
    page, wrong = documented(), []
    for config in (name for name in configs() if name.startswith(folder)):
        ours = resolved(config)
        wrong += [f"{config}: {key} is {value}, documented {page[config].get(key)}"
                  for key, value in differences(ours, page[config])]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_the_page_shows_the_list_of_differences():
    for stage in {deviation.stage for deviation in read_deviations()}:
        assert as_table(stage) in PAGE.read_text(), f"paste semaim.parity.deviations.as_table({stage!r})"


# Numbers in the code


def optimizer_of(config: str, classes: int | None = 10):
    """The optimizer that a config's training has, of a network as deep and 64 channels wide."""
    cfg = load_config(ROOT / config, {"model.network.embed_dim": 64, "model.network.num_heads": 2})
    if classes:
        cfg.model.network.num_classes = classes
    cfg.optim_wrapper.optimizer.lr = plan_batch(cfg.total_batch_size, 1, cfg.images_per_gpu, cfg.base_lr).lr
    wrapper = dict(cfg.optim_wrapper)
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.get(wrapper.pop("constructor"))
    return constructor(wrapper, wrapper.pop("paramwise_cfg", None))(build_model(cfg.model)).optimizer


def transforms_of(config: str):
    """The training transform of a config."""
    dataset = load_config(ROOT / config).dataset.to_dict()
    names = ("augment", "min_scale", "rand_augment", "random_erase")
    return training_transform(224, **{name: dataset[name] for name in names if name in dataset}).transforms


def pretraining_transforms(folder):
    """The transforms of pretraining."""
    images = PretrainImages(str(folder), min_scale=load_config(ROOT / PRETRAIN).dataset.min_scale)
    return images.transform.transforms


def groups(optimizer, name: str) -> list:
    """The values of an option over an optimizer's groups, each once."""
    return sorted({group[name] for group in optimizer.param_groups})


def small(config: str) -> nn.Module:
    """The model of a config, with a small encoder."""
    model = load_config(ROOT / config).model.to_dict()
    classes = {"num_classes": 10} if "num_classes" in model["network"] else {}
    return build_model({**model, "network": {**model["network"], **TINY, **classes}})


def part(transforms, kind: str):
    """The transform of a class."""
    return next(step for step in transforms if type(step).__name__ == kind)


CODE = {
    "pretraining: peak learning rate": lambda _: optimizer_of(PRETRAIN, None).param_groups[0]["lr"],
    "pretraining: AdamW betas": lambda _: list(optimizer_of(PRETRAIN, None).param_groups[0]["betas"]),
    "pretraining: AdamW eps": lambda _: optimizer_of(PRETRAIN, None).param_groups[0]["eps"],
    "pretraining: weight decays": lambda _: groups(optimizer_of(PRETRAIN, None), "weight_decay"),
    "pretraining: share of the rate after 0, 15, 30, 415 and 800 epochs": lambda _: [
        round(cosine_with_warmup(epoch, 800, 30), 12) for epoch in (0, 15, 30, 415, 800)
    ],
    "pretraining: crop's share of the image": lambda f: list(
        part(pretraining_transforms(f), "RandomResizedCrop").scale
    ),
    "pretraining: crop's width over height": lambda f: [
        round(side, 4) for side in part(pretraining_transforms(f), "RandomResizedCrop").ratio
    ],
    "pretraining: crop's interpolation": lambda f: (
        part(pretraining_transforms(f), "RandomResizedCrop").interpolation.value
    ),
    "pretraining: flip": lambda f: part(pretraining_transforms(f), "RandomHorizontalFlip").p,
    "pretraining: blur, side and sum": lambda _: [
        PixelTarget((16, 16)).kernel.shape[-1],
        round(PixelTarget((16, 16)).kernel.sum().item(), 5),
    ],
    "EMA: decay in epochs 0, 50, 100 and 799": lambda _: [round(ema_decay(e), 6) for e in (0, 50, 100, 799)],
    "encoder: width, depth and heads of ViT-S, B, L and H": lambda _: [
        [SIZES[size][name] for name in ("embed_dim", "depth", "num_heads")]
        for size in ("small", "base", "large", "huge")
    ],
    "encoder: MLP's width over the encoder's": lambda _: small(PRETRAIN).network.mlp_ratio,
    "encoder: eps of its LayerNorms": lambda _: sorted(
        {module.eps for module in small(PRETRAIN).modules() if isinstance(module, nn.LayerNorm)}
    ),
    "fine-tuning: peak learning rate": lambda _: groups(optimizer_of(FINETUNE), "lr")[-1],
    "fine-tuning: lowest learning rate of a layer": lambda _: round(groups(optimizer_of(FINETUNE), "lr")[0], 9),
    "fine-tuning: AdamW betas": lambda _: list(optimizer_of(FINETUNE).param_groups[0]["betas"]),
    "fine-tuning: AdamW eps": lambda _: optimizer_of(FINETUNE).param_groups[0]["eps"],
    "fine-tuning: weight decays": lambda _: groups(optimizer_of(FINETUNE), "weight_decay"),
    "fine-tuning: crop's share of the image": lambda _: list(transforms_of(FINETUNE)[0].scale),
    "fine-tuning: RandAugment's operations an image": lambda _: part(transforms_of(FINETUNE), "RandAugment").num_layers,
    "fine-tuning: RandAugment's magnitude, its deviation, probability": lambda _: [
        getattr(part(transforms_of(FINETUNE), "RandAugment").ops[0], name)
        for name in ("magnitude", "magnitude_std", "prob")
    ],
    "fine-tuning: random erasing's probability, areas, boxes": lambda _: [
        getattr(part(transforms_of(FINETUNE), "RandomErasing"), name)
        for name in ("probability", "min_area", "max_area", "max_count")
    ],
    "fine-tuning: mixup's probability, of switching to cutmix, mode": lambda _: [
        getattr(small(FINETUNE).mixup, name) for name in ("mix_prob", "switch_prob", "mode")
    ],
    "evaluation: resized to, cropped to, interpolation": lambda _: [
        evaluation_transform(224, load_config(ROOT / FINETUNE).dataset.crop_pct).transforms[0].size[0],
        evaluation_transform(224).transforms[1].size[0],
        evaluation_transform(224).transforms[0].interpolation.value,
    ],
    "linear probing (MAE): LARS momentum, trust coefficient, weight decay": lambda _: [
        optimizer_of(LARS).param_groups[0][name] for name in ("momentum", "trust_coeff", "weight_decay")
    ],
    "linear probing: eps of the batch normalisation, affine": lambda _: [
        getattr(part(small(PROBE).modules(), "BatchNorm1d"), name) for name in ("eps", "affine")
    ],
    "fast probe: momentum, deviation of the first weights": lambda _: [features.MOMENTUM, features.INIT_STD],
    "fast probe: its options": lambda _: LOOPS.build(dict(type="FastProbe")).options,
    "fast probe: its learning rates": lambda _: list(signature(features.fast_probe).parameters["lrs"].default),
    "attentive probing: LARS momentum, trust coefficient, weight decay, peak rate": lambda _: [
        optimizer_of(ATTENTIVE).param_groups[0][name] for name in ("momentum", "trust_coeff", "weight_decay", "lr")
    ],
    "attentive probing: queries, channels out and in, deviation of the first queries": lambda _: [
        attentive_head("ep", 768, 10)[0].cls_token.shape[1],
        *attentive_head("ep", 768, 10)[0].v.weight.shape,
        round(attentive_head("ep", 768, 10)[0].cls_token.std().item(), 3),
    ],
    "attentive probing: eps of the batch normalisation, affine": lambda _: [
        getattr(part(small(ATTENTIVE).modules(), "BatchNorm1d"), name) for name in ("eps", "affine")
    ],
    "attentive probing (AIM): queries, heads, eps of the batch normalisation, bias of the classifier": lambda _: [
        attentive_head("aim", 768, 10)[0].cls_token.shape[1],
        attentive_head("aim", 768, 10)[0].heads,
        attentive_head("aim", 768, 10)[0].bn.eps,
        attentive_head("aim", 768, 10)[1].bias is not None,
    ],
    "fast attentive probe: its options": lambda _: LOOPS.build(dict(type="FastAttentive")).options,
    "fast attentive probe: its learning rates": lambda _: list(attentive.LRS),
}


@pytest.mark.parametrize("name", CODE)
def test_a_number_in_the_code_is_what_the_page_says(name, scenes):
    torch.manual_seed(0)
    documented = ast.literal_eval(rows("Numbers in the code")[name])
    found = CODE[name](scenes)
    assert found == (pytest.approx(documented) if isinstance(documented, float) else documented)


def test_the_page_has_every_number_in_the_code():
    assert set(rows("Numbers in the code")) == set(CODE)
