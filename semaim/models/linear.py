"""Linear layers that cost less: products by the faster library, and inputs that are computed again, not kept.

*Products.* PyTorch multiplies fp32 matrices on a CPU with the BLAS it was built with. Its x86 wheels have MKL, which
leaves AVX-512 unused on AMD processors; oneDNN, in the same wheels, uses it everywhere. The sums are the same, in
another order.

*Memory.* A linear layer keeps its input for the backward pass. Behind a norm or an activation, that input follows
quickly from what the norm or activation keeps anyway, so it is not stored but computed again.
"""

import platform
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

#: Smaller products, of fewer multiplications than this, take less time than the call.
LEAST_WORK = 1 << 20
ONE_DNN = (
    platform.machine().lower() in ("x86_64", "amd64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def autocast_type(x: Tensor) -> torch.dtype | None:
    """What autocast computes products of a tensor's device in; None without autocast."""
    kind = x.device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if enabled else None


def lowered(x: Tensor) -> Tensor:
    """`x` in the type that autocast computes products in, if it is fp32 and there is autocast: half as much to keep.

    Layers that share an input take it from here, so that one copy is made and kept, not one for each layer.
    """
    low = autocast_type(x)
    return x.to(low) if low and x.dtype == torch.float32 else x


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, without gradient on its own: (..., in), (out, in), (out,) -> (..., out)."""
    if (
        ONE_DNN
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * len(weight) >= LEAST_WORK
        and torch.backends.mkldnn.enabled
        and autocast_type(x) is None
    ):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class _Behind(torch.autograd.Function):
    """Linear layer behind a cheap function, of which only the input is kept."""

    @staticmethod
    def forward(ctx, cheap: Callable | None, x: Tensor, weight: Tensor, bias: Tensor, *parameters: Tensor) -> Tensor:
        ctx.cheap, ctx.kind, ctx.low = cheap, x.device.type, autocast_type(x)
        ctx.save_for_backward(x, weight, bias, *parameters)
        return product(cheap(x, *parameters) if cheap else x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *parameters = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *needs = ctx.needs_input_grad[1:]
        given = dict(enumerate((needs_x, *needs)))
        with torch.autocast(ctx.kind, ctx.low) if ctx.low else nullcontext():
            if ctx.cheap:
                with torch.enable_grad():
                    inputs = [t.detach().requires_grad_(given[i]) for i, t in enumerate((x, *parameters))]
                    y = ctx.cheap(*inputs)
            else:
                inputs, y = [x], x
            grads: list[Tensor | None] = [None] * len(inputs)
            if any(given.values()):
                through = product(grad, weight.T).to(y.dtype)
                if ctx.cheap:
                    wanted = [t for t in inputs if t.requires_grad]
                    found = iter(torch.autograd.grad(y, wanted, through))
                    grads = [next(found) if t.requires_grad else None for t in inputs]
                else:
                    grads = [through]
            flat = grad.flatten(0, -2)
            of_weight = product(flat.T, y.detach().flatten(0, -2).T).to(weight.dtype) if needs_weight else None
            of_bias = flat.sum(0).to(bias.dtype) if needs_bias else None
        return None, grads[0], of_weight, of_bias, *grads[1:]


def linear(x: Tensor, weight: Tensor, bias: Tensor, cheap: Callable | None = None, *parameters: Tensor) -> Tensor:
    """cheap(x, *parameters) @ weight.T + bias.

    Args:
        x: (..., in).
        weight, bias: (out, in), (out,).
        cheap: computed again in the backward pass, so it has to be quick and without chance; None for nothing.
        *parameters: tensors that `cheap` takes besides `x`.

    Returns:
        (..., out).
    """
    if torch.compiler.is_compiling():  # the compiler decides by itself what to keep
        return F.linear(cheap(x, *parameters) if cheap else x, weight, bias)
    return _Behind.apply(cheap, x if cheap else lowered(x), weight, bias, *parameters)


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(x, self.weight, self.bias)


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))), by timm's names; the activation's output is computed again in the backward pass.

    Args:
        dim, hidden, out: channels; `out` is `dim` if None.
    """

    def __init__(self, dim: int, hidden: int, out: int | None = None):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, out or dim)

    def forward(self, x: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        """(..., dim) -> (..., out), of norm(x) where a norm is given, whose output is not kept either."""
        if norm is None:
            hidden = self.fc1(x)
        else:

            def normalise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)

            hidden = linear(x, self.fc1.weight, self.fc1.bias, normalise, norm.weight, norm.bias)
        return linear(hidden, self.fc2.weight, self.fc2.bias, F.gelu)
