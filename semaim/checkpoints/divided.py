"""Loading whole tensors into a model that FSDP2 has sharded over processes."""

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def divided_like(value: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a tensor that every process has whole, if `like` is sharded; else the tensor itself."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def load_whole_state(module: nn.Module, state: dict[str, Tensor], strict: bool = True) -> None:
    """`module.load_state_dict` with whole tensors, also for a sharded module."""
    own = module.state_dict()
    fitted = {name: divided_like(value, own[name]) if name in own else value for name, value in state.items()}
    module.load_state_dict(fitted, strict=strict)
