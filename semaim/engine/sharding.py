"""Weights, gradients and optimizer state sharded over the processes by PyTorch's FSDP2, for models too large for a GPU.

Checkpoints hold whole tensors under the same names, so a run can resume sharded or not, on any number of processes.
"""

from typing import Any

import torch
from mmengine.dist import get_world_size, is_main_process
from mmengine.model import revert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from semaim.checkpoints.divided import divided_like
from semaim.engine.compiling import blocks_of
from semaim.engine.network import NetworkModel

#: For weights that are used in products alone, which autocast casts to bf16: a process sends the cast numbers, half as
#: many bytes, and the sum of the gradients over the processes is still made in fp32.
LOW = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)


def shard(model: nn.Module) -> nn.Module:
    """Shard a model in place, block by block: a process gathers whole weights only for the block being computed.

    Gradients are the mean over the processes, as with DDP, and the shards stay fp32: the results are DDP's except for
    the order of sums. In bf16 the linear layers of a block are gathered in bf16; norms and all else in fp32.
    """
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        model = revert_sync_batchnorm(model)  # torch refuses SyncBN on a CPU
    mesh = init_device_mesh("cuda" if on_gpu else "cpu", (get_world_size(),))
    for block in blocks_of(model):
        for part in block.children() if always_low(model, mesh.device_type) else ():
            if only_linear(part):
                fully_shard(part, mesh=mesh, mp_policy=LOW)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule) and hasattr(module, "class_attention"):
            register_fsdp_forward_method(module, "class_attention")  # it gathers the weights, too
    return model


def always_low(model: nn.Module, device: str) -> bool:
    """Whether all passes of a model through its blocks are in bf16, so that no product needs the fp32 weights.

    Not so where the order pass is in fp32, nor in detectors and segmentors, which are validated in fp32.
    """
    if not isinstance(model, NetworkModel) or model.computed_in(device) != "bf16":
        return False
    return getattr(model.network, "look_precision", "same") == "same"


def only_linear(module: nn.Module) -> bool:
    """Whether all parameters of a module are those of linear layers inside it, as of attention and MLP."""
    linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    of_linear = {parameter for layer in linear for parameter in layer.parameters()}
    return bool(linear) and set(module.parameters()) == of_linear


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has sharded the model."""
    return isinstance(model, FSDPModule)


def gathered(value: Any) -> Any:
    """Nested dicts and lists with whole tensors, on the main process's CPU; every process has to call it.

    On the others, sharded tensors are replaced by None.
    """
    if isinstance(value, DTensor):
        whole = value.full_tensor()
        return whole.cpu() if is_main_process() else None
    if isinstance(value, dict):
        return {key: gathered(item) for key, item in value.items()}
    if isinstance(value, list):
        return [gathered(item) for item in value]
    return value


def load_whole_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """`optimizer.load_state_dict` with whole tensors, also for a sharded model."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def fitted(number: int, values: dict) -> dict:
        like = parameters[number] if number < len(parameters) else torch.empty(0)
        return {k: divided_like(v, like) if isinstance(v, Tensor) else v for k, v in values.items()}

    divided = {number: fitted(number, values) for number, values in state["state"].items()}
    optimizer.load_state_dict({**state, "state": divided})
