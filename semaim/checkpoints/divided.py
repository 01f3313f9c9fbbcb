"""Whole tensors of a file into a model whose weights are divided among processes by FSDP2."""

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def divided_like(value: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has whole -> this process's part of it, where `like` is divided; else itself."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def load_whole_state(module: nn.Module, state: dict[str, Tensor], strict: bool = True) -> None:
    """`module.load_state_dict` of whole tensors, also into a divided module."""
    own = module.state_dict()
    fitted = {name: divided_like(value, own[name]) if name in own else value for name, value in state.items()}
    module.load_state_dict(fitted, strict=strict)
