"""What a computation does, counted and not run: bytes, multiplications, and tensors kept for the backward pass.

PyTorch runs it on fake tensors, which have shapes and dtypes but no values. So a step of ViT-B with 256 images is
counted on a laptop in seconds. Operations are those below autograd, as a GPU would start them one by one; a compiled
part is counted from the compiler's graph, with what it can fuse fused.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from semaim.engine.compiling import KEPT_SHARE
from semaim.models import cpu_products, segvit

aten = torch.ops.aten

#: Kind of work -> beginnings of the names of its operations; the first that fits counts. The rest is "sums and others".
KINDS = {
    "attention": ("_scaled_dot_product", "relative_attention", "_flash_attention", "_efficient_attention"),
    "products": ("mm", "addmm", "bmm", "baddbmm", "convolution"),
    "norms": ("native_layer_norm", "native_group_norm"),
    "activations": ("gelu", "_softmax", "_safe_softmax"),
    "casts": ("_to_copy",),
    "optimizer": ("_fused_adam", "_foreach"),
    "copies": ("clone", "cat", "gather", "scatter", "index", "constant_pad", "copy_", "stack", "new_zeros", "zeros"),
    "sorts": ("sort", "argsort", "argmax"),
}
#: Functions that CUDA's autocast runs in fp32 and that the models call; a CPU's leaves them in bf16.
IN_FP32 = {
    F.layer_norm, F.softmax, torch.softmax, Tensor.softmax, F.cosine_similarity, F.mse_loss, F.l1_loss, F.group_norm,
    F.cross_entropy, torch.layer_norm,
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """One operation, or one kernel of several fused ones.

    Attributes:
        name: of the operation, or of those that were fused.
        kind: a key of `KINDS`, or "sums and others" or "fused".
        shape: of the largest result.
        dtype: of the largest input of a product, which sets the rate; of the result otherwise.
        flops: multiplications and additions of products, convolutions and attention (half of them if causal).
        bytes: read and written.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    flops: int
    bytes: int


def kind_of(name: str) -> str:
    """The kind of an operation's work."""
    return next((kind for kind, starts in KINDS.items() if name.startswith(starts)), "sums and others")


def size(tensor: Tensor) -> int:
    """Bytes of a tensor in memory; a value that is expanded along an axis lies there once."""
    return tensor.element_size() * math.prod(n for n, s in zip(tensor.shape, tensor.stride(), strict=True) if s)


def tensors(values: Any) -> list[Tensor]:
    """The tensors in nested values."""
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def named(func: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """An operation's arguments by name."""
    return {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}


def flops_of(func: Any, args: tuple, kwargs: dict, out: Any) -> int:
    """Multiplications and additions of an operation: those of PyTorch's counter, half of them for causal attention."""
    packet = func.overloadpacket
    if packet not in flop_registry:
        return 0
    count = flop_registry[packet](*args, **kwargs, out_val=out)
    return count // 2 if named(func, args, kwargs).get("is_causal") else count


def work_of(func: Any, args: tuple, kwargs: dict, out: Any) -> Work | None:
    """The work of an operation; None for views and for what touches no data."""
    read, made = tensors((args, kwargs)), tensors(out)
    storages = {tensor.untyped_storage()._cdata for tensor in read}
    changed = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    written = [tensor for tensor in made if tensor.untyped_storage()._cdata not in storages]
    name = func.overloadpacket.__name__
    if not changed and not written or name.startswith("empty") or name.startswith("new_empty"):
        return None
    arguments = named(func, args, kwargs)
    written += tensors([arguments.get(name) for name in changed])
    if not written:
        return None
    largest = max(written, key=Tensor.numel)
    flops = flops_of(func, args, kwargs, out)
    rate = max(read, key=Tensor.numel).dtype if flops else largest.dtype
    total = sum(map(size, unique(read))) + sum(map(size, written))
    return Work(name, kind_of(name), tuple(largest.shape), rate, flops, total)


def unique(found: Iterable[Tensor]) -> list[Tensor]:
    """Each tensor once."""
    return list({id(tensor): tensor for tensor in found}.values())


@dataclass
class Count(TorchDispatchMode):
    """Context manager that lists the work of what runs in it, and the tensors kept for the backward pass.

    Attributes:
        works: in order.
        kept: storage -> bytes of what is kept, without the storages in `given`.
        given: of parameters and inputs, which exist in any case.
    """

    works: list[Work] = field(default_factory=list)
    kept: dict[int, int] = field(default_factory=dict)
    given: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()
        self.paused = False
        self.alive: list[Tensor] = []  # a storage's number is used again after it is freed

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let the compiler trace what runs in the context."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run an operation and note its work."""
        out = func(*args, **(kwargs or {}))
        if (
            not self.paused
            and func.namespace in ("aten", "semaim")
            and (work := work_of(func, args, kwargs or {}, out))
        ):
            self.works.append(work)
        return out

    def keep(self, tensor: Tensor) -> Tensor:
        """Note a tensor that autograd keeps."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.given:
            self.kept[storage._cdata] = storage.nbytes()
            self.alive.append(tensor)
        return tensor

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Context manager around a forward pass: notes what it keeps."""
        with torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor):
            yield

    def compiled(self, graph: GraphModule, _inputs: Any = None) -> Callable:
        """A compiler for PyTorch's `aot_autograd`: notes the graph's fused work each time that it runs."""
        from torch._functorch.aot_autograd import make_boxed_func

        from semaim.benchmarks.fusion import kernels_of

        works = kernels_of(graph)

        def run(*args: Any) -> Any:
            before, self.paused = self.paused, True
            try:
                return graph(*args)
            finally:
                self.paused = before
                self.works += works

        return make_boxed_func(run)


class CudaAutocast(TorchFunctionMode):
    """A CPU's autocast made to run the same functions in fp32 as CUDA's."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Cast the inputs of the functions in `IN_FP32`."""
        kwargs = kwargs or {}
        if func in IN_FP32 and torch.is_autocast_enabled("cpu"):
            args = tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
            kwargs = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}
        return func(*args, **kwargs)


def gpu_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """The kernel that a GPU would run: flash attention, or the memory-efficient one in fp32 and with a bias."""
    if attn_mask is None and query.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Context manager in which models on a CPU's fake tensors run the operations that they would run on a GPU."""
    index = segvit.bias_index.__wrapped__  # a cached fake tensor would be found by real models later
    with (
        patch.object(cpu_products, "ONE_DNN", False),
        patch.object(F, "scaled_dot_product_attention", gpu_attention),
        patch.object(segvit, "bias_index", index),
    ):
        yield


@contextlib.contextmanager
def counted_compile(blocks: list[nn.Module], count: Count) -> Iterator[None]:
    """Context manager in which blocks are compiled as `compile_blocks` does, by a compiler that counts."""
    import torch._functorch.config as partitioner
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    backend = aot_autograd(
        fw_compiler=count.compiled, bw_compiler=count.compiled, inference_compiler=count.compiled,
        partition_fn=min_cut_rematerialization_partition, decompositions=select_decomp_table(),
    )  # fmt: skip
    for block in blocks:
        block.compile(backend=backend, dynamic=False)
    try:
        with partitioner.patch(activation_memory_budget=KEPT_SHARE):
            yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None
        torch._dynamo.reset()
