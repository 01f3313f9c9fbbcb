"""ViTDet against detectron2: tokens, blocks, pyramid levels, losses, gradients, and learning rates by depth."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semaim.engine.optim import layer_depths
from semaim.models.vitdet import SimpleFeaturePyramid, ViTDet
from semaim.parity.cases import Case, CaseReport, gradient

#: Level -> index of its 1x1 convolution in detectron2's `simfp_N`. The 3x3 one is next, layers before it resample.
LATERAL = {"2": 4, "3": 1, "4": 0, "5": 1}


def our_name(name: str) -> str:
    """detectron2's name of a parameter -> ours in `build_model`'s: `simfp_2.4.norm.bias` -> `pyramid.levels.p2...`."""
    if not name.startswith("simfp_"):
        return name
    level, place, rest = name.removeprefix("simfp_").split(".", 2)
    after = int(place) - LATERAL[level]
    part = f"resample.{place}" if after < 0 else ("lateral", "output")[after]
    if rest.startswith("norm."):
        part, rest = f"{part}_norm", rest.removeprefix("norm.")
    return f"pyramid.levels.p{level}.{part}.{rest}"


def convert(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """detectron2's parameters under our names, without the position of the class token."""
    converted = {our_name(name): tensor for name, tensor in parameters.items()}
    converted["net.pos_embed"] = converted["net.pos_embed"][:, 1:]
    return converted


def build_model(case: Case) -> nn.ModuleDict:
    """Our encoder (`net`) and pyramid (`pyramid`) with the configuration and parameters of a case."""
    net, pyramid = case.meta["config"]["net"], case.meta["config"]["pyramid"]
    model = nn.ModuleDict(
        {
            "net": ViTDet(
                img_size=net["img_size"],
                pretrain_img_size=net["pretrain_img_size"],
                window_size=net["window_size"],
                global_blocks=tuple(i for i in range(net["depth"]) if i not in net["window_block_indexes"]),
                rel_pos=net["use_rel_pos"],
                patch_size=net["patch_size"],
                in_chans=net["in_chans"],
                embed_dim=net["embed_dim"],
                depth=net["depth"],
                num_heads=net["num_heads"],
                mlp_ratio=net["mlp_ratio"],
            ),
            "pyramid": SimpleFeaturePyramid(
                net["embed_dim"], pyramid["out_channels"], net["patch_size"], tuple(pyramid["scale_factors"])
            ),
        }
    ).eval()
    for module in model["net"].modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = net["layer_norm_eps"]
    model.load_state_dict(convert(case.parameters()))
    return model


def check(case: Case, report: CaseReport) -> None:
    """Run one case; its contents decide what is checked."""
    if isinstance(case.images, dict):
        check_model(case, report)
    elif "factor" in case.scalars:
        check_layer_decay(case, report)


def check_model(case: Case, report: CaseReport) -> None:
    """For every input: each step of the forward pass, the probe loss, its gradients, and the loss in fp64."""
    model = build_model(case)
    net, pyramid = cast(ViTDet, model["net"]), cast(SimpleFeaturePyramid, model["pyramid"])
    steps: dict[str, Tensor] = {}
    for index, block in enumerate(net.blocks):
        block.register_forward_hook(lambda _, args, out, index=index: steps.update({f"block.{index}": out}))

    for given, images in case.named_batches.items():
        steps.clear()
        model.zero_grad()
        steps["tokens"] = net.embed(images)
        levels = dict(zip(pyramid.names, pyramid(net(images)), strict=True))
        steps["loss"] = loss = probe_loss(case, given, levels)
        loss.backward()
        parameters = dict(model.named_parameters())
        for name, golden in case.tensors.items():
            if not name.startswith(f"{given}."):
                continue
            what = name.removeprefix(f"{given}.")
            if what.startswith("grad."):
                ours = gradient(parameters[our_name(what.removeprefix("grad."))])
                if what == "grad.net.pos_embed":  # the position of the class token is unused
                    ours = F.pad(ours, (0, 0, 1, 0))
            else:
                ours = {**steps, **levels}[what]
            report.add(name, ours, golden, case.tolerance(name))
        scalar = torch.tensor(case.scalars[f"loss_{given}"], dtype=torch.float64)
        report.add(f"loss_{given}", loss, scalar, case.tolerance(f"{given}.loss"))

    model.double()
    for given, images in case.named_batches.items():
        levels = dict(zip(pyramid.names, pyramid(net(images.double())), strict=True))
        name = f"loss_fp64_{given}"
        report.add_relative(name, probe_loss(case, given, levels).item(), case.scalars[name])


def probe_loss(case: Case, given: str, levels: dict[str, Tensor]) -> Tensor:
    """Sum over the levels (B, C, H, W) of the mean of level * channel * row * column; the vectors are the case's."""
    parts = []
    for name, level in levels.items():
        channel, row, column = (
            case.tensors[f"probe.{given}.{name}.{axis}"].to(level) for axis in ("channel", "row", "column")
        )
        parts.append((level * channel[:, None, None] * row[:, None] * column).mean())
    return torch.stack(parts).sum()


def check_layer_decay(case: Case, report: CaseReport) -> None:
    """Learning rate factors of a detector's parameters, by name."""
    factors, cfg = case.scalars["factor"], case.meta["config"]
    detector = nn.Module()
    detector.backbone = nn.Module()
    with torch.device("meta"):
        detector.backbone.net = ViTDet(depth=cfg["num_layers"])
    depth_of = layer_depths(detector)
    for name, factor in factors.items():
        layer, layers = depth_of(name)
        report.add_relative(f"factor.{name}", cfg["lr_decay_rate"] ** (layers - 1 - layer), factor)
