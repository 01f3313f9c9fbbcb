"""Triton kernels of attention with decomposed relative positions: heads keep their width, nothing of N x N is stored.

A block of keys is a few whole rows of the grid, each padded to BLOCK_W columns. So the bias along the width, (queries,
BLOCK_W), is the same for every block of keys: it is read once and stays in registers, and the bias along the height is
one number per query and row. The backward pass has one kernel for queries, whose loop over the rows of keys also gives
both biases' gradients (a sum over rows, and sums within a row), and one for keys and values. No sums are atomic, so two
runs are equal to the bit.

Shapes: B images, n heads, N = H * W tokens row by row, d channels of a head. Statistics and sums are fp32.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

LOG2E = tl.constexpr(1.4426950408889634)  # exp2 is an instruction, exp is not


@triton.jit
def _program(blocks, heads):
    """What this program computes: the block, and the image, the head and the number of both, in int64 for offsets."""
    number = tl.program_id(0)  # of one axis: a second one has 65,535 places at most
    pair = (number // blocks).to(tl.int64)
    return number % blocks, pair // heads, pair % heads, pair


@triton.jit
def _tile(base, place, inside, stride, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `place` of a matrix of DIM columns: (rows, BLOCK_D), zero outside."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    pointers = base + place[:, None] * stride + channel
    if DIM < BLOCK_D:
        return tl.load(pointers, mask=inside[:, None] & (channel < DIM), other=0.0)
    return tl.load(pointers, mask=inside[:, None], other=0.0)


@triton.jit
def _put(base, tile, place, inside, stride, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Inverse of `_tile`, in the dtype of the pointer."""
    channel = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (channel[None, :] < DIM)
    tl.store(base + place[:, None] * stride + channel[None, :], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _keys(row, height, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_W: tl.constexpr):
    """Places of the keys of ROWS rows of the grid from `row` on, and whether they exist: (ROWS * BLOCK_W,) each."""
    number = tl.arange(0, ROWS * BLOCK_W)
    line, column = row + number // BLOCK_W, number % BLOCK_W
    if ROWS == 1:  # there is no row below the grid
        return line * WIDTH + column, column < WIDTH
    return line * WIDTH + column, (line < height) & (column < WIDTH)


@triton.jit
def _along_width(base, place, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """The bias along the width of these queries, in units of log2(e): (queries, BLOCK_W), -inf for padding."""
    column = tl.arange(0, BLOCK_W)[None, :]
    bias = tl.load(base + place[:, None] * WIDTH + column, mask=column < WIDTH, other=float("-inf"))
    return bias * LOG2E


@triton.jit
def _along_height(base, place, row, height, ROWS: tl.constexpr):
    """The bias along the height of these queries and ROWS rows of keys: (queries, ROWS), -inf below the grid."""
    line = row + tl.arange(0, ROWS)[None, :]
    if ROWS == 1:
        return tl.load(base + place[:, None] * height + line) * LOG2E
    return tl.load(base + place[:, None] * height + line, mask=line < height, other=float("-inf")) * LOG2E


@triton.jit
def _add(logits, bias_h, bias_w, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, BLOCK_W: tl.constexpr):
    """Logits (queries, ROWS * BLOCK_W) with the biases (queries, ROWS) and (queries, BLOCK_W) added."""
    # The width's first: it is brought to the layout of the products once, outside of the loop.
    if ROWS == 1:
        return logits + bias_w + bias_h
    logits = tl.reshape(logits, (BLOCK_M, ROWS, BLOCK_W)) + bias_w[:, None, :] + bias_h[:, :, None]
    return tl.reshape(logits, (BLOCK_M, ROWS * BLOCK_W))


@triton.jit(do_not_specialize=["heads"])
def _forward(
    q, k, v, along_h, along_w, out, lse, q_image, q_head, q_token, k_image, k_head, k_token, v_image, v_head, v_token,
    heads, tokens, height, scale, WIDTH: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output (B, N, n, d), and the logarithm to base 2 of each query's sum of exponentials, (B, n, N)."""
    block, image, head, pair = _program(tl.cdiv(tokens, BLOCK_M), heads)
    place = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = place < tokens
    place = tl.minimum(place, tokens - 1)  # beyond the last query it is computed again, and not stored
    query = _tile(q + image * q_image + head * q_head, place, inside, q_token, DIM, BLOCK_D)
    bias_w = _along_width(along_w + pair * tokens * WIDTH, place, WIDTH, BLOCK_W)
    k += image * k_image + head * k_head
    v += image * v_image + head * v_head
    along_h += pair * tokens * height
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for row in range(0, height, ROWS):
        keys, exist = _keys(row, height, WIDTH, ROWS, BLOCK_W)
        key = _tile(k, keys, exist, k_token, DIM, BLOCK_D)
        bias_h = _along_height(along_h, place, row, height, ROWS)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2E)
        logits = _add(logits, bias_h, bias_w, BLOCK_M, ROWS, BLOCK_W)
        new = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp2(logits - new[:, None])
        shrink = tl.exp2(largest - new)
        total = total * shrink + tl.sum(weights, 1)
        value = _tile(v, keys, exist, v_token, DIM, BLOCK_D)
        sums = tl.dot(weights.to(value.dtype), value, sums * shrink[:, None], input_precision=PRECISION)
        largest = new
    _put(out + (image * tokens * heads + head) * DIM, sums / total[:, None], place, inside, heads * DIM, DIM, BLOCK_D)
    tl.store(lse + pair * tokens + place, largest + tl.log2(total), mask=inside)


@triton.jit(do_not_specialize=["heads"])
def _backward_queries(
    q, k, v, along_h, along_w, out, grad, lse, delta, grad_q, grad_h, grad_w, q_image, q_head, q_token,
    k_image, k_head, k_token, v_image, v_head, v_token, g_image, g_head, g_token,
    heads, tokens, height, scale, WIDTH: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries (B, N, n, d) and of both biases, and `delta`, the sum of output times its gradient."""
    block, image, head, pair = _program(tl.cdiv(tokens, BLOCK_M), heads)
    place = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = place < tokens
    place = tl.minimum(place, tokens - 1)  # beyond the last query it is computed again, and not stored
    query = _tile(q + image * q_image + head * q_head, place, inside, q_token, DIM, BLOCK_D)
    slope = _tile(grad + image * g_image + head * g_head, place, inside, g_token, DIM, BLOCK_D)
    own = (image * tokens * heads + head) * DIM
    result = _tile(out + own, place, inside, heads * DIM, DIM, BLOCK_D)
    offset = tl.sum(result.to(tl.float32) * slope.to(tl.float32), 1)
    tl.store(delta + pair * tokens + place, offset, mask=inside)
    norm = tl.load(lse + pair * tokens + place)
    bias_w = _along_width(along_w + pair * tokens * WIDTH, place, WIDTH, BLOCK_W) - norm[:, None]
    k += image * k_image + head * k_head
    v += image * v_image + head * v_head
    along_h += pair * tokens * height
    grad_h += pair * tokens * height
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    sums_w = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    for row in range(0, height, ROWS):
        keys, exist = _keys(row, height, WIDTH, ROWS, BLOCK_W)
        key = _tile(k, keys, exist, k_token, DIM, BLOCK_D)
        bias_h = _along_height(along_h, place, row, height, ROWS)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2E)
        weights = tl.exp2(_add(logits, bias_h, bias_w, BLOCK_M, ROWS, BLOCK_W))
        value = _tile(v, keys, exist, v_token, DIM, BLOCK_D)
        slopes = tl.dot(slope, tl.trans(value), input_precision=PRECISION)
        slopes = weights * (slopes - offset[:, None])  # of the logits
        if ROWS == 1:
            sums_w += slopes
            tl.store(grad_h + place * height + row, tl.sum(slopes, 1), mask=inside)
        else:
            by_row = tl.reshape(slopes, (BLOCK_M, ROWS, BLOCK_W))
            sums_w += tl.sum(by_row, 1)
            line = row + tl.arange(0, ROWS)[None, :]
            mask = inside[:, None] & (line < height)
            tl.store(grad_h + place[:, None] * height + line, tl.sum(by_row, 2), mask=mask)
        sums = tl.dot(slopes.to(key.dtype), key, sums, input_precision=PRECISION)
    _put(grad_q + own, sums * scale, place, inside, heads * DIM, DIM, BLOCK_D)
    _put(grad_w + pair * tokens * WIDTH, sums_w, place, inside, WIDTH, WIDTH, BLOCK_W)


@triton.jit(do_not_specialize=["heads"])
def _backward_keys(
    q, k, v, along_h, along_w, grad, lse, delta, grad_k, grad_v, q_image, q_head, q_token,
    k_image, k_head, k_token, v_image, v_head, v_token, g_image, g_head, g_token,
    heads, tokens, height, scale, WIDTH: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values, (B, N, n, d). Products are of keys with queries: the transposes of the others."""
    block, image, head, pair = _program(tl.cdiv(height, ROWS), heads)
    row = block * ROWS
    keys, exist = _keys(row, height, WIDTH, ROWS, BLOCK_W)
    key = _tile(k + image * k_image + head * k_head, keys, exist, k_token, DIM, BLOCK_D)
    value = _tile(v + image * v_image + head * v_head, keys, exist, v_token, DIM, BLOCK_D)
    q += image * q_image + head * q_head
    grad += image * g_image + head * g_head
    along_h += pair * tokens * height
    along_w += pair * tokens * WIDTH
    sums_k = tl.zeros((ROWS * BLOCK_W, BLOCK_D), tl.float32)
    sums_v = tl.zeros((ROWS * BLOCK_W, BLOCK_D), tl.float32)
    for start in range(0, tokens, BLOCK_M):
        place = start + tl.arange(0, BLOCK_M)
        inside = place < tokens
        query = _tile(q, place, inside, q_token, DIM, BLOCK_D)
        last = tl.minimum(place, tokens - 1)
        # An infinite sum gives queries outside of the map no weight.
        norm = tl.load(lse + pair * tokens + place, mask=inside, other=float("inf"))
        bias_h = _along_height(along_h, last, row, height, ROWS) - norm[:, None]
        bias_w = _along_width(along_w, last, WIDTH, BLOCK_W)
        logits = tl.dot(key, tl.trans(query), input_precision=PRECISION) * (scale * LOG2E)
        if ROWS == 1:
            logits = logits + tl.trans(bias_w) + tl.trans(bias_h)
        else:
            logits = tl.reshape(logits, (ROWS, BLOCK_W, BLOCK_M)) + tl.trans(bias_w)[None] + tl.trans(bias_h)[:, None]
            logits = tl.reshape(logits, (ROWS * BLOCK_W, BLOCK_M))
        weights = tl.exp2(logits)
        slope = _tile(grad, place, inside, g_token, DIM, BLOCK_D)
        sums_v = tl.dot(weights.to(slope.dtype), slope, sums_v, input_precision=PRECISION)
        slopes = tl.dot(value, tl.trans(slope), input_precision=PRECISION)
        offset = tl.load(delta + pair * tokens + place, mask=inside, other=0.0)
        slopes = weights * (slopes - offset[None, :])
        sums_k = tl.dot(slopes.to(query.dtype), query, sums_k, input_precision=PRECISION)
    own = (image * tokens * heads + head) * DIM
    _put(grad_k + own, sums_k * scale, keys, exist, heads * DIM, DIM, BLOCK_D)
    _put(grad_v + own, sums_v, keys, exist, heads * DIM, DIM, BLOCK_D)


class Blocks(NamedTuple):
    """Sizes of a kernel's blocks: queries, rows of keys; and the stages of its loads."""

    queries: int
    rows: int
    stages: int


class Plan(NamedTuple):
    """How the kernels run; eight warps each."""

    block_d: int
    block_w: int
    forward: Blocks
    queries: Blocks
    keys: Blocks


def plan(dtype: torch.dtype, dim: int, width: int) -> Plan:
    """Blocks whose loops need at most 255 registers a thread and, but for the widest, 99 KB of shared memory.

    Found by compiling for compute capability 8.0, 8.9 and 9.0; `ValueError` for sizes that would not fit.
    """
    block_d, block_w = (max(16, triton.next_power_of_2(size)) for size in (dim, width))
    most = max(block_d, block_w)
    if dtype == torch.float32 and most <= 64:
        blocks = Blocks(16, max(1, 32 // block_w), 1)
        return Plan(block_d, block_w, blocks, blocks, blocks)
    if dtype in (torch.bfloat16, torch.float16) and most <= 64:
        rows = 64 // block_w
        return Plan(block_d, block_w, Blocks(128, rows, 3), Blocks(128, rows, 2), Blocks(64, 2 * rows, 2))
    if dtype in (torch.bfloat16, torch.float16) and most == 128:
        rows = max(1, 64 // block_w)
        queries = Blocks(32 if block_w == 128 else 64, rows, 2)
        return Plan(block_d, block_w, Blocks(64, rows, 2), queries, Blocks(32, rows, 2))
    raise ValueError(f"no kernel for heads of {dim} channels, rows of {width} patches and {dtype}")


def _launch(
    kernel: Any, query: Tensor, along_h: Tensor, along_w: Tensor, tensors: list[Tensor], *strided: Tensor
) -> None:
    """Run a kernel, one program for each head and block: on `tensors`, then the strides of `strided`."""
    (images, heads, tokens, dim), height, width = query.shape, along_h.shape[-1], along_w.shape[-1]
    chosen = plan(query.dtype, dim, width)
    blocks = {_forward: chosen.forward, _backward_queries: chosen.queries, _backward_keys: chosen.keys}[kernel]
    split = triton.cdiv(height, blocks.rows) if kernel is _backward_keys else triton.cdiv(tokens, blocks.queries)
    with torch.cuda.device_of(query):
        kernel[(images * heads * split,)](
            *tensors, *(stride for tensor in strided for stride in tensor.stride()[:3]),
            heads, tokens, height, dim**-0.5, WIDTH=width, DIM=dim, BLOCK_D=chosen.block_d, BLOCK_W=chosen.block_w,
            ROWS=blocks.rows, BLOCK_M=blocks.queries, PRECISION="ieee", num_warps=8, num_stages=blocks.stages,
        )  # fmt: skip


def _strided(*tensors: Tensor) -> list[Tensor]:
    """Channels next to each other, as the kernels read them; a copy only of tensors that are otherwise."""
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]


def _by_token(query: Tensor) -> Tensor:
    """A new tensor (B, n, N, d) that lies as (B, N, n, d) in memory, as the output's projection reads it."""
    images, heads, tokens, dim = query.shape
    return query.new_empty(images, tokens, heads, dim).transpose(1, 2)


def _gradients(query: Tensor, along_h: Tensor, along_w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """New tensors for the gradients of queries, keys, values and both biases."""
    biases = along_h.new_empty(along_h.shape), along_w.new_empty(along_w.shape)
    return _by_token(query), _by_token(query), _by_token(query), *biases


@torch.library.custom_op("semaim::relative_attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor, along_h: Tensor, along_w: Tensor) -> tuple[Tensor, Tensor]:
    """Attention whose logits are q.k / sqrt(d), plus `along_h` at the key's row, plus `along_w` at its column.

    Args:
        query, key, value: (B, n, N, d), of one dtype that `plan` knows.
        along_h, along_w: fp32 (B, n, N, H) and (B, n, N, W).

    Returns:
        (B, n, N, d), and the logarithm to base 2 of each query's sum of exponentials, fp32 (B, n, N).
    """
    query, key, value = _strided(query, key, value)
    along_h, along_w = along_h.contiguous(), along_w.contiguous()
    out, lse = _by_token(query), along_h.new_empty(query.shape[:3])
    tensors = [query, key, value, along_h, along_w, out, lse]
    _launch(_forward, query, along_h, along_w, tensors, query, key, value)
    return out, lse


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, along_h: Tensor, along_w: Tensor) -> tuple[Tensor, Tensor]:
    return _by_token(query), along_h.new_empty(query.shape[:3])


@torch.library.custom_op("semaim::relative_attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, along_h: Tensor, along_w: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the arguments of `attention`, in its order, from that of its output."""
    grad, query, key, value = _strided(grad, query, key, value)
    along_h, along_w, lse = along_h.contiguous(), along_w.contiguous(), lse.contiguous()
    out = out.transpose(1, 2).contiguous().transpose(1, 2)  # as it was made: no copy, unless a compiler moved it
    delta, grads = torch.empty_like(lse), _gradients(query, along_h, along_w)
    inputs = [query, key, value, along_h, along_w]
    tensors = [*inputs, out, grad, lse, delta, grads[0], grads[3], grads[4]]
    _launch(_backward_queries, query, along_h, along_w, tensors, query, key, value, grad)
    _launch(_backward_keys, query, along_h, along_w, [*inputs, grad, lse, delta, *grads[1:3]], query, key, value, grad)
    return grads


@attention_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, along_h: Tensor, along_w: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, ...]:
    return _gradients(query, along_h, along_w)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, ...]:
    return attention_backward(grad, *ctx.saved_tensors)


attention.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.semaim.relative_attention)
def _forward_flops(query: tuple, *_: Any, **__: Any) -> int:
    """Two products of N x N x d."""
    images, heads, tokens, dim = query
    return 2 * 2 * images * heads * tokens**2 * dim


@register_flop_formula(torch.ops.semaim.relative_attention_backward)
def _backward_flops(grad: tuple, *_: Any, **__: Any) -> int:
    """Seven: weights and the gradients of logits in both kernels, and the gradients of queries, keys and values."""
    return 7 * _forward_flops(grad) // 2
