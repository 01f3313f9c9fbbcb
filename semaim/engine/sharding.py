"""Weights, gradients and optimizer state sharded over the processes by PyTorch's FSDP2, for models too large for a GPU.

Checkpoints hold whole tensors under the same names, so a run can resume sharded or not, on any number of processes.
"""

from typing import Any

import torch
from mmengine.dist import get_world_size, is_main_process
from mmengine.model import revert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from semaim.checkpoints.divided import divided_like
from semaim.engine.compiling import blocks_of


def shard(model: nn.Module) -> nn.Module:
    """Shard a model in place, block by block: a process gathers whole weights only for the block being computed.

    Gradients are the mean over the processes, as with DDP, and weights stay fp32: the results are DDP's except for the
    order of sums.
    """
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        model = revert_sync_batchnorm(model)  # torch refuses SyncBN on a CPU
    mesh = init_device_mesh("cuda" if on_gpu else "cpu", (get_world_size(),))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


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
