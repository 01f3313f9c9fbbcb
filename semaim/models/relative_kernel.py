"""Triton kernels of attention with decomposed relative positions: heads keep their width, nothing of N x N is stored.

A block of keys is a few whole rows of the grid, each padded to BLOCK_W columns. So the bias along the width, (queries,
BLOCK_W), is the same for every block of keys: it is read once and stays in registers, and the bias along the height is
one number per query and row. The backward pass has one kernel for queries, whose loop over the rows of keys also gives
both biases' gradients (a sum over rows, and sums within a row), and one for keys and values. No sums are atomic, so two
runs are equal to the bit.

Shapes: B images, n heads, N = H * W tokens row by row, d channels of a head. Statistics and sums are fp32.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

LOG2E = tl.constexpr(1.4426950408889634)  # exp2 is an instruction, exp is not


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


@triton.jit
def _forward(
    q, k, v, along_h, along_w, out, lse, q_image, q_head, q_token, k_image, k_head, k_token, v_image, v_head, v_token,
    heads, tokens, height, scale, WIDTH: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output (B, N, n, d), and the logarithm to base 2 of each query's sum of exponentials, (B, n, N)."""
    pair = tl.program_id(1).to(tl.int64)
    image, head = pair // heads, pair % heads
    place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = place < tokens
    query = _tile(q + image * q_image + head * q_head, place, inside, q_token, DIM, BLOCK_D)
    last = tl.minimum(place, tokens - 1)
    bias_w = _along_width(along_w + pair * tokens * WIDTH, last, WIDTH, BLOCK_W)
    k += image * k_image + head * k_head
    v += image * v_image + head * v_head
    along_h += pair * tokens * height
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for row in range(0, height, ROWS):
        keys, exist = _keys(row, height, WIDTH, ROWS, BLOCK_W)
        key = _tile(k, keys, exist, k_token, DIM, BLOCK_D)
        bias_h = _along_height(along_h, last, row, height, ROWS)
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


@triton.jit
def _backward_queries(
    q, k, v, along_h, along_w, out, grad, lse, delta, grad_q, grad_h, grad_w, q_image, q_head, q_token,
    k_image, k_head, k_token, v_image, v_head, v_token, g_image, g_head, g_token,
    heads, tokens, height, scale, WIDTH: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries (B, N, n, d) and of both biases, and `delta`, the sum of output times its gradient."""
    pair = tl.program_id(1).to(tl.int64)
    image, head = pair // heads, pair % heads
    place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = place < tokens
    query = _tile(q + image * q_image + head * q_head, place, inside, q_token, DIM, BLOCK_D)
    slope = _tile(grad + image * g_image + head * g_head, place, inside, g_token, DIM, BLOCK_D)
    own = (image * tokens * heads + head) * DIM
    result = _tile(out + own, place, inside, heads * DIM, DIM, BLOCK_D)
    offset = tl.sum(result.to(tl.float32) * slope.to(tl.float32), 1)
    tl.store(delta + pair * tokens + place, offset, mask=inside)
    last = tl.minimum(place, tokens - 1)
    norm = tl.load(lse + pair * tokens + last)
    bias_w = _along_width(along_w + pair * tokens * WIDTH, last, WIDTH, BLOCK_W) - norm[:, None]
    k += image * k_image + head * k_head
    v += image * v_image + head * v_head
    along_h += pair * tokens * height
    grad_h += pair * tokens * height
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    sums_w = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    for row in range(0, height, ROWS):
        keys, exist = _keys(row, height, WIDTH, ROWS, BLOCK_W)
        key = _tile(k, keys, exist, k_token, DIM, BLOCK_D)
        bias_h = _along_height(along_h, last, row, height, ROWS)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2E)
        weights = tl.exp2(_add(logits, bias_h, bias_w, BLOCK_M, ROWS, BLOCK_W))
        value = _tile(v, keys, exist, v_token, DIM, BLOCK_D)
        slopes = tl.dot(slope, tl.trans(value), input_precision=PRECISION)
        slopes = weights * (slopes - offset[:, None])  # of the logits
        sums = tl.dot(slopes.to(key.dtype), key, sums, input_precision=PRECISION)
        if ROWS == 1:
            sums_w += slopes
            tl.store(grad_h + place * height + row, tl.sum(slopes, 1), mask=inside)
        else:
            slopes = tl.reshape(slopes, (BLOCK_M, ROWS, BLOCK_W))
            sums_w += tl.sum(slopes, 1)
            line = row + tl.arange(0, ROWS)[None, :]
            mask = inside[:, None] & (line < height)
            tl.store(grad_h + place[:, None] * height + line, tl.sum(slopes, 2), mask=mask)
    _put(grad_q + own, sums * scale, place, inside, heads * DIM, DIM, BLOCK_D)
    _put(grad_w + pair * tokens * WIDTH, sums_w, place, inside, WIDTH, WIDTH, BLOCK_W)


@triton.jit
def _backward_keys(
    q, k, v, along_h, along_w, grad, lse, delta, grad_k, grad_v, q_image, q_head, q_token,
    k_image, k_head, k_token, v_image, v_head, v_token, g_image, g_head, g_token,
    heads, tokens, height, scale, WIDTH: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values, (B, N, n, d). Products are of keys with queries: the transposes of the others."""
    pair = tl.program_id(1).to(tl.int64)
    image, head = pair // heads, pair % heads
    row = tl.program_id(0) * ROWS
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
