"""Memory in training: linear layers that recompute their input in the backward pass in place of storing it.

A linear layer keeps its input for the backward pass. After a norm or an activation, that input follows quickly from
the norm's or activation's own input, which is kept in any case. So only the latter is stored.

To do without: `linear_after_norm(x, norm, layer)` is `layer(norm(x))`, `linear_after_gelu(x, layer)` is
`layer(gelu(x))`, `in_autocast_dtype(x)` is `x`, and `linear` and `Linear` are PyTorch's own.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from semaim.models.cpu_products import product


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast computes products on a tensor's device; None without autocast."""
    kind = x.device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if enabled else None


def in_autocast_dtype(x: Tensor) -> Tensor:
    """`x` cast to autocast's dtype if it is fp32 and autocast is on: half as much to keep.

    Layers that share an input take it from here, so that one copy is made and kept, not one for each layer.
    """
    dtype = autocast_dtype(x)
    return x.to(dtype) if dtype and x.dtype == torch.float32 else x


class RecomputedLinear(torch.autograd.Function):
    """linear(before(x)): stores `x` and recomputes before(x) in the backward pass."""

    @staticmethod
    def forward(ctx, before: Callable | None, x: Tensor, weight: Tensor, bias: Tensor, *parameters: Tensor) -> Tensor:
        """linear(before(x, *parameters), weight, bias)."""
        ctx.before, ctx.device_type, ctx.autocast_dtype = before, x.device.type, autocast_dtype(x)
        ctx.save_for_backward(x, weight, bias, *parameters)
        return product(before(x, *parameters) if before else x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the arguments of `forward`, in its order."""
        x, weight, bias, *parameters = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *needs_parameters = ctx.needs_input_grad[1:]
        needs = (needs_x, *needs_parameters)
        with torch.autocast(ctx.device_type, ctx.autocast_dtype) if ctx.autocast_dtype else nullcontext():
            if ctx.before:
                with torch.enable_grad():
                    tensors = zip((x, *parameters), needs, strict=True)
                    inputs = [tensor.detach().requires_grad_(need) for tensor, need in tensors]
                    y = ctx.before(*inputs)
            else:
                inputs, y = [x], x
            grads: list[Tensor | None] = [None] * len(inputs)
            if any(needs):
                grad_y = product(grad, weight.T).to(y.dtype)
                if ctx.before:
                    found = iter(torch.autograd.grad(y, [t for t in inputs if t.requires_grad], grad_y))
                    grads = [next(found) if t.requires_grad else None for t in inputs]
                else:
                    grads = [grad_y]
            rows = grad.flatten(0, -2)
            grad_weight = product(rows.T, y.detach().flatten(0, -2).T).to(weight.dtype) if needs_weight else None
            grad_bias = rows.sum(0).to(bias.dtype) if needs_bias else None
        return None, grads[0], grad_weight, grad_bias, *grads[1:]


def linear(x: Tensor, weight: Tensor, bias: Tensor, before: Callable | None = None, *parameters: Tensor) -> Tensor:
    """before(x, *parameters) @ weight.T + bias, as `torch.nn.functional.linear`.

    Args:
        x: (..., in).
        weight, bias: (out, in), (out,).
        before: recomputed in the backward pass, so it has to be fast and deterministic; None for the identity.
        *parameters: further tensors that `before` takes.

    Returns:
        (..., out).
    """
    if torch.compiler.is_compiling():  # the compiler itself decides what to keep
        return F.linear(before(x, *parameters) if before else x, weight, bias)
    return RecomputedLinear.apply(before, x if before else in_autocast_dtype(x), weight, bias, *parameters)


class Linear(nn.Linear):
    """`nn.Linear` through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(x, self.weight, self.bias)


def linear_after_norm(x: Tensor, norm: nn.LayerNorm, layer: nn.Linear) -> Tensor:
    """layer(norm(x)): (..., in) -> (..., out). The norm's output is recomputed."""

    def normalise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)

    return linear(x, layer.weight, layer.bias, normalise, norm.weight, norm.bias)


def linear_after_gelu(x: Tensor, layer: nn.Linear) -> Tensor:
    """layer(gelu(x)): (..., in) -> (..., out). The activation's output is recomputed."""
    return linear(x, layer.weight, layer.bias, F.gelu)
