"""Speed on a CPU: matrix products through oneDNN.

PyTorch multiplies fp32 matrices on a CPU with the BLAS it was built with. Its x86 wheels have MKL, which does not use
AVX-512 on AMD processors. oneDNN, in the same wheels, uses it on all. Both compute the same sums in another order.

To do without: import `linear` of torch.nn.functional as `product` in `semaim.models.recompute`, the only user.
"""

import platform

import torch
import torch.nn.functional as F
from torch import Tensor

#: For products of fewer multiplications, the call itself takes longer than what it saves.
LEAST_WORK = 1 << 20
ONE_DNN = (
    platform.machine().lower() in ("x86_64", "amd64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias: (..., in), (out, in), (out,) -> (..., out). The oneDNN call has no gradient of its own."""
    if (
        ONE_DNN
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * len(weight) >= LEAST_WORK
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
    ):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
