"""One pass of sharded models beside whole ones, in two processes: torchrun tests/sharded.py; a line of JSON for each.

In each process: the loss of its images and the loss of the whole model on them; the largest difference of the gathered
gradients from the mean of the whole model's over both processes' images, relative to the largest of the tensor.
"""

import copy
import json
import os
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import semaim.methods  # noqa: F401  registers networks
from semaim.engine import precision
from semaim.engine.classification import Classification
from semaim.engine.launcher import join, leave
from semaim.engine.pretraining import Pretraining
from semaim.engine.sharding import gathered, shard

SMALL: dict[str, Any] = dict(type="SemAIM", target=dict(type="PixelTarget"), img_size=32, patch_size=8, embed_dim=32,
                             depth=2, num_heads=2)  # fmt: skip
ARGS = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SWIGLU = "vit_small_plus_patch16_dinov3"  # rotary positions, layer scale, a gated MLP
CASES: dict[str, dict[str, Any]] = {
    "semaim": SMALL,
    "ema": SMALL | {"guide": "ema"},
    "self": SMALL | {"similarity": "self"},
    "look in fp32": SMALL | {"look_precision": "fp32"},
    "with_cp": SMALL | {"with_cp": True},
    "shared": SMALL | {"share_weights": True},
    "ours": dict(type="Classifier", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5),
    **{arch: dict(type="Classifier", num_classes=5, img_size=32, pool="avg",
                  encoder={"family": "timm", "arch": arch, "args": ARGS, "patch_size": 8})
       for arch in ("vit_tiny_patch16_224", SWIGLU)},
}  # fmt: skip


def build(network: dict[str, Any], low: str) -> nn.Module:
    """The model of a case, the same in every process."""
    torch.manual_seed(0)
    if network["type"] == "SemAIM":
        return Pretraining(network, cpu_precision=low)
    return Classification(network, cpu_precision=low)


def inputs(model: nn.Module, process: int) -> dict[str, Tensor]:
    """The images of a process, and what else a step takes."""
    torch.manual_seed(1 + process)
    images = torch.randn(4, 3, 32, 32)
    if isinstance(model, Pretraining):
        return {"images": images, "draw": torch.rand(4, 16)}
    return {"image": images, "label": torch.arange(4), "index": torch.arange(4)}


def case(network: dict[str, Any], low: str, process: int) -> dict[str, Any]:
    """What is written of one model."""
    model = build(network, low).train()
    whole, names = copy.deepcopy(model), list(model.state_dict())
    gradients, expected = [], []
    for number in range(2):
        whole.zero_grad()
        loss = whole(**inputs(whole, number))["loss"]
        loss.backward()
        gradients.append({name: p.grad for name, p in whole.named_parameters() if p.grad is not None})
        expected.append(loss.item())
    shard(model)
    seen = set()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.register_forward_pre_hook(
                lambda module, _: seen.update(
                    (name, str(p.dtype)) for name, p in module.named_parameters() if not hasattr(p, "to_local")
                )
            )
    loss = model(**inputs(model, process))["loss"]
    loss.backward()
    error = 0.0
    for name, p in model.named_parameters():
        if p.grad is not None:
            found, mean = p.grad.full_tensor(), (gradients[0][name] + gradients[1][name]) / 2
            error = max(error, ((found - mean).abs().max() / mean.abs().max().clamp(min=1e-12)).item())
    state = gathered(model.state_dict())
    kept = {name for name, tensor in whole.state_dict().items() if process or tensor.equal(state[name])}
    return {
        "loss": loss.item(), "expected": expected[process], "error": error,
        "names": list(state) == names, "kept": len(kept) == len(names),
        "low": sorted({name.rpartition(".")[0].rpartition(".")[2] for name, kind in seen if kind == "torch.bfloat16"}),
        "types": sorted({str(p.dtype) for p in model.parameters()} | {str(p.grad.dtype) for p in model.parameters()
                                                                      if p.grad is not None}),
    }  # fmt: skip


if __name__ == "__main__":
    precision.cpu_has_bf16 = lambda: True  # PyTorch computes the same without instructions for it, slowly
    join()
    rank = torch.distributed.get_rank()
    for low in precision.PRECISIONS:
        for key, network in CASES.items():
            line = {"case": key, "precision": low, "rank": rank, **case(network, low, rank)}
            os.write(1, (json.dumps(line) + "\n").encode())  # whole: the other process writes to the same pipe
    leave()
