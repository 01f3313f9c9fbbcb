"""CLIP's image encoder as teacher against the official code: from a file with OpenAI's names to a student's loss."""

from typing import Any

import torch
from timm import create_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from semaim.models import SemAIM, Teacher
from semaim.parity.cases import Case, CaseReport

#: The architecture in the configs; the recorded tower is smaller.
ARCHITECTURE = "vit_base_patch16_clip_quickgelu_224"
PREFIX = "teacher."


def build_tower(case: Case, architecture: str = ARCHITECTURE) -> VisionTransformer:
    """timm's network of an architecture, with the recorded sizes and the recorded weights in full precision."""
    cfg = case.meta["config"]["tower"]
    network: Any = create_model(
        architecture,
        img_size=cfg["img_size"],
        patch_size=cfg["patch_size"],
        embed_dim=cfg["width"],
        depth=cfg["layers"],
        num_heads=cfg["heads"],
        num_classes=cfg["out_dim"],
        dynamic_img_size=True,
    )
    weights = {name.removeprefix(PREFIX): t.float() for name, t in case.tensors.items() if name.startswith(PREFIX)}
    network.load_state_dict(checkpoint_filter_fn(weights, network))
    return network


def check_tower(case: Case, report: CaseReport, student: SemAIM) -> None:
    """The tower's tokens block by block, and the whole step with it in fp64.

    Args:
        student: with the recorded weights; it is converted to fp64.
    """
    golden, scalars, images = case.tensors, case.scalars, case.batch
    network = build_tower(case)
    seen: dict[str, Tensor] = {}
    stages: dict[str, nn.Module] = {"tower.embedding_image0": network.norm_pre}
    stages |= {f"tower.block.{index}_image0": block for index, block in enumerate(network.blocks)}
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output[:1]}))
        for name, module in stages.items()
    ]
    tokens = Teacher(network, project=True, normalisation="student")(images, student.grid)
    for hook in hooks:
        hook.remove()
    for name, output in {**seen, "teacher_tokens": tokens}.items():
        report.add(name, output, golden[name], case.tolerance(name))

    network.double()
    student.double()
    tokens = Teacher(network, project=True, normalisation="student")(images.double(), student.grid)
    order = golden["order_key"].argsort(dim=-1, stable=True)
    target = student.target.prepare(images.double(), tokens)
    with torch.no_grad():
        loss = student.target.loss(student.predict(images.double(), order), target).mean()
    report.add_relative("loss_fp64_whole", loss.item(), scalars["loss_fp64_whole"])
