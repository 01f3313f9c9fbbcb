"""Attention of a map to itself with decomposed relative positions, in two forms that give the same numbers.

The logit of a query at (y, x) and a key at (v, u) is scale * q.k + q.h[y - v] + q.w[x - u], with the unscaled q in the
last two. `folded` runs on any device through PyTorch's fused attention, `relative_kernel` on a GPU through Triton.

Shapes: B images, n heads, N = H * W tokens row by row, d channels of a head.
"""

import logging
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

#: What `relative_attention` can run.
KERNELS = ("folded", "triton")

#: Flash attention takes head widths that are multiples of this (16 bytes of bf16).
HEAD_MULTIPLE = 8

#: How far the kernel may be from the folded form in fp64: some roundings of its inputs' dtype, not more.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def relative_vectors(table: Tensor, side: int) -> Tensor:
    """Vectors of all (query, key) pairs of one axis: table (2 * s - 1, d) -> (side, side, d).

    Row `query - key + side - 1` of the table, which is first resampled along its length if it was made for another s.
    """
    if len(table) != 2 * side - 1:
        table = F.interpolate(table.T[None], 2 * side - 1, mode="linear", align_corners=False)[0].T
    place = torch.arange(side, device=table.device)
    return table[place[:, None] - place + side - 1]


def along_axes(query: Tensor, grid: tuple[int, int], rel_pos_h: Tensor, rel_pos_w: Tensor) -> tuple[Tensor, Tensor]:
    """q.h of every query with each row, and q.w with each column: (B, n, N, d) -> (B, n, N, H), (B, n, N, W)."""
    maps = query.unflatten(2, grid)
    along_h = torch.einsum("bnhwd,hkd->bnhwk", maps, relative_vectors(rel_pos_h, grid[0]))
    along_w = torch.einsum("bnhwd,wkd->bnhwk", maps, relative_vectors(rel_pos_w, grid[1]))
    return along_h.flatten(2, 3), along_w.flatten(2, 3)


def folded(query: Tensor, key: Tensor, value: Tensor, along_h: Tensor, along_w: Tensor) -> Tensor:
    """Attention whose logits are q.k / sqrt(d), plus `along_h` at the key's row, plus `along_w` at its column.

    The biases are products themselves: of the H + W numbers of a query with the key's row and column, one-hot. So
    q' = [q / sqrt(d), along_h, along_w] and k' = [k, onehot(v), onehot(u)] give the same logits as q'.k', exactly, and
    a fused kernel can run: memory grows with N (H + W) in place of N^2 (at 1024 pixels 128 against 4096 numbers per
    query and head).

    Args:
        query, key, value: (B, n, N, d).
        along_h, along_w: (B, n, N, H) and (B, n, N, W).

    Returns:
        (B, n, N, d).
    """
    dim, height, width = query.shape[-1], along_h.shape[-1], along_w.shape[-1]
    blank = query.new_zeros(*query.shape[:-1], -(dim + height + width) % HEAD_MULTIPLE)
    query = torch.cat([query * dim**-0.5, along_h, along_w, blank], dim=-1)

    row, column = (torch.eye(side, dtype=key.dtype, device=key.device) for side in (height, width))
    place = torch.cat([row.repeat_interleave(width, 0), column.repeat(height, 1)], dim=1)  # (N, H + W)
    place = F.pad(place, (0, blank.shape[-1]))
    key = torch.cat([key, place.expand(*key.shape[:2], -1, -1)], dim=-1)
    # Flash attention, on CPU and GPU, needs values as wide as the keys; otherwise N x N weights would be built.
    value = F.pad(value, (0, query.shape[-1] - dim))
    return F.scaled_dot_product_attention(query, key, value, scale=1.0)[..., :dim]


def relative_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    kernel: str = "folded",
) -> Tensor:
    """Attention of a map to itself with decomposed relative positions, without ever building the N x N bias.

    Args:
        query, key, value: (B, n, N, d), N = H * W.
        grid: (H, W).
        rel_pos_h, rel_pos_w: (2 * side - 1, d) tables of the two axes, shared by the heads.
        kernel: "folded", or "triton": heads of d in place of d + H + W channels, and biases in fp32 under autocast too.
            Where it cannot run, or was wrong when it was tried, the folded form does, with one warning.

    Returns:
        (B, n, N, d).
    """
    # Triton compiles for sizes that 16 divides, as 64 x 64 patches, and for others: what runs is what has been tried.
    height = 5 if grid[0] % 16 else 16
    if kernel == "triton" and works(query.device, query.dtype, query.shape[-1], height, grid[1]):
        from semaim.models.relative_kernel import attention

        with torch.autocast(query.device.type, enabled=False):
            biases = along_axes(query.float(), grid, rel_pos_h.float(), rel_pos_w.float())
        return attention(query, key, value, *biases)[0]
    return folded(query, key, value, *along_axes(query, grid, rel_pos_h, rel_pos_w))


@torch.compiler.assume_constant_result  # a compiler asks once and does not look inside
def works(device: torch.device, dtype: torch.dtype, dim: int, height: int, width: int) -> bool:
    """Whether the kernel runs on a device: no `find_fault`. If not, one line says why."""
    fault = find_fault(device, dtype, dim, height, width)
    if fault:
        warn(fault)
    return not fault


@cache
def warn(fault: str) -> None:
    """One line for each fault."""
    logging.getLogger(__name__).warning(f"rel_pos_kernel='triton': {fault}; the folded form runs instead")


@cache
def find_fault(device: torch.device, dtype: torch.dtype, dim: int, height: int, width: int) -> str | None:
    """Why the kernel should not run; None if it gives the folded form's output and gradients to `TOLERANCE`.

    Tried once for each device, dtype and size, for heads of `dim` channels and a small (height, width) map.
    """
    if device.type != "cuda":
        return f"it needs a GPU, not {device.type}"
    if find_spec("triton") is None:
        return "triton is not installed"
    try:
        if torch.version.cuda and torch.cuda.get_device_capability(device) < (8, 0):
            return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
        off = difference(device, dtype, dim, height, width)
    except Exception as error:  # whatever a compiler, a driver or a device raises: the folded form can always run
        return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    return None if off <= TOLERANCE[dtype] else f"it is off by {off:.1e} for {dtype}, more than {TOLERANCE[dtype]:.0e}"


def difference(device: torch.device, dtype: torch.dtype, dim: int, height: int, width: int) -> float:
    """Largest relative difference of the kernel from the folded form in fp64, of the output and of five gradients.

    For two heads of random numbers.
    """
    from semaim.models.relative_kernel import attention

    numbers, found = torch.Generator(device).manual_seed(0), []
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        widths = (dim, dim, dim, dim, height, width)
        parts = [torch.randn(1, 2, height * width, size, device=device, generator=numbers) for size in widths]
        probe, *inputs = (part.to(dtype) for part in parts)
        for form, own, of_biases in ((attention, dtype, torch.float32), (folded, torch.float64, torch.float64)):
            leaves = [tensor.to(own).requires_grad_() for tensor in inputs[:3]]
            leaves += [tensor.to(of_biases).requires_grad_() for tensor in inputs[3:]]
            out = form(*leaves)
            out = out if form is folded else out[0]  # the kernel also returns its statistics
            found.append([out, *torch.autograd.grad(out, leaves, probe.to(out.dtype))])
    errors = [(a.double() - b).norm() / b.norm() for a, b in zip(*found, strict=True)]
    return torch.stack(errors).nan_to_num(float("inf"), float("inf")).max().item()
