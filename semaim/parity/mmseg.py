"""UperNet against mmseg: the MAE backbone on crops of another grid than the pretraining's, test sizes, and names."""

from importlib.util import find_spec
from typing import cast

import numpy as np
import torch
from mmengine.registry import MODELS, TRANSFORMS
from torch import Tensor

from semaim.checkpoints.dialects import INERT, MMPRETRAIN, rename
from semaim.engine import dense
from semaim.engine.config import load_config
from semaim.errors import UserError
from semaim.models.segvit import BiasedAttention, SegmentationViT, bias_index
from semaim.models.vit import LAYER_NORM_EPS, Block, resize_positions
from semaim.parity.cases import Case, CaseReport, gradient
from semaim.places import own_config, to_install


def our_name(name: str) -> str:
    """mmseg's name of a backbone's parameter -> ours."""
    found = rename(f"backbone.{name}", MMPRETRAIN)
    if found is None:
        raise UserError(f"{name} is no parameter of mmseg's backbone that is known here")
    return found


def build_model(case: Case) -> SegmentationViT:
    """Our backbone with the configuration and parameters of a case; only the position table is resized by our code."""
    cfg = case.meta["config"]
    if cfg["norm_cfg"]["eps"] != LAYER_NORM_EPS:
        raise ValueError(f"{case.name}: LayerNorm eps {cfg['norm_cfg']['eps']}, ours is {LAYER_NORM_EPS}")
    model = SegmentationViT(
        img_size=tuple(cfg["img_size"]),
        patch_size=cfg["patch_size"],
        in_chans=cfg["in_channels"],
        embed_dim=cfg["embed_dims"],
        depth=cfg["num_layers"],
        num_heads=cfg["num_heads"],
        mlp_ratio=cfg["mlp_ratio"],
        out_blocks=tuple(cfg["out_indices"]),
        layer_scale=cfg["init_values"],
    ).eval()
    parameters = {our_name(name): t for name, t in case.parameters().items() if not name.endswith(INERT)}
    model.load_state_dict({**parameters, "pos_embed": positions(case, torch.float32)})
    return model


def positions(case: Case, dtype: torch.dtype) -> Tensor:
    """The pretrained position table on the crop's grid (1, 1 + L, D)."""
    cfg = case.meta["config"]
    return resize_positions(
        case.tensors["pretrain.pos_embed"].to(dtype), tuple(cfg["pretrain_grid"]), tuple(cfg["crop_grid"])
    )


def check(case: Case, report: CaseReport) -> None:
    """Run one case; its contents decide what is checked."""
    if "pretrain.pos_embed" in case.tensors:
        check_backbone(case, report)
    elif find_spec("mmseg") is None:
        report.uncovered = f"mmsegmentation is not installed ({to_install('all')})"
    elif "img_ratios" in case.meta["config"]:
        check_test_sizes(case, report)
    elif "keys" in case.scalars:
        check_keys(case, report)


def check_backbone(case: Case, report: CaseReport) -> None:
    """The resized table, every step of the forward pass, the probe loss, its gradients, and the loss in fp64."""
    model = build_model(case)
    steps: dict[str, Tensor] = {}
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, args, out, index=index: steps.update({f"block.{index}": out}))
    images = case.tensors["images"]
    steps["tokens"] = model.embed(images)
    maps = model(images)
    steps |= {f"map.{index}": one for index, one in enumerate(maps)}
    first = cast(BiasedAttention, cast(Block, model.blocks[0]).attn)
    steps["bias_block0"] = first.bias(model.grid, first.rel_bias.dtype)
    steps["loss"] = loss = probe_loss(case, maps)
    loss.backward()
    parameters = dict(model.named_parameters())
    ours = {f"param.{name}": parameters[our_name(name)] for name in case.parameters() if not name.endswith(INERT)}
    for name, golden in case.tensors.items():
        if name.startswith("grad."):
            report.add(name, gradient(parameters[our_name(name.removeprefix("grad."))]), golden, case.tolerance(name))
        elif name in steps or name == "param.pos_embed":
            report.add(name, steps[name] if name in steps else ours[name], golden, case.tolerance(name))
    loss_of_json = torch.tensor(case.scalars["loss"], dtype=torch.float64)
    report.add("loss (json)", loss, loss_of_json, case.tolerance("loss"))

    model.double().zero_grad()
    model.pos_embed.data = positions(case, torch.float64)
    loss = probe_loss(case, model(images.double()))
    loss.backward()
    report.add_relative("loss_fp64", loss.item(), case.scalars["loss_fp64"])
    for name, golden in case.scalars["grad_l2_norm_fp64"].items():
        norm = gradient(dict(model.named_parameters())[our_name(name)]).norm().item()
        report.add_relative(f"grad_l2_norm_fp64.{name}", norm, golden)
    model.pos_embed.data = case.tensors["param.pos_embed"].double()
    with torch.no_grad():
        loss = probe_loss(case, model(images.double()))
    report.add_relative("loss_fp64_from_param", loss.item(), case.scalars["loss_fp64_from_param"])


def probe_loss(case: Case, maps: tuple[Tensor, ...]) -> Tensor:
    """Sum over the maps (B, D, H, W) of the mean of map * channel * row * column; the vectors are the case's."""
    parts = []
    for index, one in enumerate(maps):
        vectors = (case.tensors[f"probe.map.{index}.{axis}"] for axis in ("channel", "row", "column"))
        channel, row, column = (vector.to(one) for vector in vectors)
        parts.append((one * channel[:, None, None] * row[:, None] * column).mean())
    return torch.stack(parts).sum()


def check_test_sizes(case: Case, report: CaseReport) -> None:
    """The sizes that the transforms of our multi-scale test give blank images, and the flips."""
    cfg = load_config(own_config("mmseg_configs/semaim_upernet_ms.py"))
    dense.enter(cfg)
    released = case.meta["config"]
    report.add("img_ratios", torch.tensor(cfg.tta_ratios), torch.tensor(released["img_ratios"]), None)
    for step in ("crop_size", "stride"):
        report.add(step, torch.tensor(cfg.model.test_cfg[step]), torch.tensor(released["test_cfg"][step]), None)
    dense.averaged(cfg)
    (augment,) = (step for step in cfg.val_dataset.pipeline if "transforms" in step)
    scales, flips = augment["transforms"][:2]
    report.add("flips", torch.tensor([flip["prob"] for flip in flips]), torch.tensor([0.0, 1.0]), None)
    for name, recorded in case.scalars.items():
        height, width = map(int, name.split("x"))
        sizes = []
        for step in scales:
            image = {"img": np.zeros((height, width, 3), np.uint8)}
            sizes.append(TRANSFORMS.build(dict(step))(image)["img"].shape[:2])
        report.add(name, torch.tensor(sizes), torch.tensor([one["size"] for one in recorded["released"]]), None)


def check_keys(case: Case, report: CaseReport) -> None:
    """The tensors of our MAE-Base UperNet under mmseg's names: same names, shapes and dtypes."""
    cfg = load_config(own_config("mmseg_configs/mae_upernet.py"))
    dense.enter(cfg)
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    own, recorded = model.state_dict(), case.scalars["keys"]
    from semaim.segmentation.mmseg_names import our_name  # needs mmseg

    index, taken = bias_index(model.backbone.grid, torch.device("cpu")), set()
    for name, golden in recorded.items():
        ours = index if name.endswith(INERT) else own.get(our_name(name))
        taken.add(our_name(name))
        same = ours is not None and [list(ours.shape), f"torch.{golden['dtype']}"] == [golden["shape"], str(ours.dtype)]
        report.add_relative(name, float(same), 1.0)
    report.add_relative("tensors that mmseg has too", float(len(taken & own.keys())), float(len(own)))
    for what, chosen in (("parameters", lambda p: True), ("trainable", lambda p: p.requires_grad)):
        count = sum(p.numel() for p in model.parameters() if chosen(p))
        report.add_relative(what, float(count), float(case.scalars[what]))
