"""The kernels of relative positions on a CPU, by Triton's interpreter: python tests/interpreted.py prints JSON.

`low_precision` as its argument gives the errors in 16 bits that docs/performance.md lists, in some minutes; a list of
cases in JSON the results of all checks of tests/test_relative_kernel.py.

A process of its own: Triton decides when the kernels are defined whether it interprets them.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from torch.utils.flop_counter import FlopCounterMode
from triton.runtime import interpreter

from semaim.models import relative, relative_kernel
from semaim.models.relative import along_axes, folded, relative_attention
from semaim.models.vitdet import ViTDet

TENSORS = ("out", "query", "key", "value", "along_h", "along_w")


def tensor(data):
    return torch.from_numpy(np.ascontiguousarray(data))


def correct_bfloat16():
    """Triton 3.8's interpreter multiplies the bit patterns of bf16, and cuts numbers to it where a GPU rounds."""
    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = tensor(handle.data.view(np.int16))
        return interpreter.TensorHandle(bits.view(torch.bfloat16).float().numpy(), tl.float32)

    def create_dot(self, a, b, *others):
        return dot(self, widened(a), widened(b), *others)

    def cast_impl(self, source, kind):
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            rounded = tensor(source.data).bfloat16().view(torch.int16).numpy().view(np.uint16)
            return interpreter.TensorHandle(rounded, tl.bfloat16)
        return cast(self, source, kind)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


def plain(query, key, value, along_h, along_w):
    """The definition, with the bias written out."""
    bias = along_h[..., :, None] + along_w[..., None, :]
    return (query @ key.mT * query.shape[-1] ** -0.5 + bias.flatten(-2)).softmax(-1) @ value


def projected(images, heads, tokens, dim, numbers):
    """Queries, keys and values (B, n, N, d) as an encoder's projection gives them: parts of one tensor."""
    whole = torch.randn(images, tokens, 3 * heads * dim, generator=numbers)
    return [part.unflatten(-1, (heads, dim)).transpose(1, 2) for part in whole.chunk(3, -1)]


def errors(*cases):
    """`error` of every case."""
    return [error(*case) for case in cases]


def error(images, heads, height, width, dim, dtype):
    """Errors of the kernel against the definition in fp64, each relative to the tensor's norm, or to 1."""
    numbers, dtype = torch.Generator().manual_seed(0), getattr(torch, dtype)
    inputs = [part.to(dtype) for part in projected(images, heads, height * width, dim, numbers)]
    inputs += [torch.randn(images, heads, height * width, side, generator=numbers) * 2 for side in (height, width)]
    probe = torch.randn(images, height * width, heads, dim, generator=numbers).to(dtype).transpose(1, 2)
    results = []
    for form, precision in ((relative_kernel.attention, None), (plain, torch.float64), (folded, torch.float64)):
        leaves = [part.detach().to(precision or part.dtype).requires_grad_() for part in inputs]
        out = form(*leaves) if precision else form(*leaves)[0]
        results.append([out, *torch.autograd.grad(out, leaves, probe.to(out.dtype))])
    ours, exact, other = results
    assert all(torch.allclose(a, b) for a, b in zip(exact, other, strict=True))  # the two forms are one in fp64
    assert all(a.dtype == b.dtype for a, b in zip(ours, [inputs[0], *inputs], strict=True))
    pairs = zip(TENSORS, ours, exact, strict=True)
    return {name: ((a.double() - b).norm() / b.norm().clamp(min=1)).item() for name, a, b in pairs}


def everywhere(*unused):
    return True


def encoder(kernel, **options):
    """A small ViTDet of two global blocks and one with windows, and its images."""
    torch.manual_seed(0)
    size = dict(patch_size=4, embed_dim=32, depth=3, num_heads=2, window_size=3, global_blocks=(1, 2))
    model = ViTDet(img_size=(20, 24), pretrain_img_size=16, rel_pos_kernel=kernel, **size, **options).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model, torch.randn(2, 3, 20, 24)


def in_an_encoder():
    """Largest relative difference of a ViTDet's map and gradients from the folded form's, plain and recomputed."""
    relative.works, found = everywhere, {}
    for name, kernel, options in (
        ("folded", "folded", {}), ("plain", "triton", {}), ("recomputed", "triton", {"with_cp": True}),
    ):  # fmt: skip
        model, images = encoder(kernel, **options)
        out = model(images)
        out.square().sum().backward()
        found[name] = [out.detach(), *(parameter.grad for parameter in model.parameters())]
    expected = found.pop("folded")
    return {
        name: max(((a - b).norm() / b.norm().clamp(min=1)).item() for a, b in zip(result, expected, strict=True))
        for name, result in found.items()
    }


def compiled():
    """Differences of relative_attention compiled without a break of the graph from the eager one."""
    relative.works, numbers = everywhere, torch.Generator().manual_seed(0)
    inputs = [part.detach().requires_grad_() for part in projected(1, 2, 12, 16, numbers)]
    inputs += [torch.randn(2 * side - 1, 16, generator=numbers).requires_grad_() for side in (3, 4)]

    def run(query, key, value, rel_pos_h, rel_pos_w):
        return relative_attention(query, key, value, (3, 4), rel_pos_h, rel_pos_w, "triton")

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        out = function(*inputs)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    return {"difference": max((a - b).abs().max().item() for a, b in zip(*results, strict=True))}


def registered():
    """PyTorch's own checks of an operator; and its operations, counted on tensors without numbers."""
    numbers = torch.Generator().manual_seed(0)
    inputs = [part.detach().requires_grad_() for part in projected(1, 2, 12, 16, numbers)]
    inputs += [torch.randn(1, 2, 12, side, generator=numbers).requires_grad_() for side in (3, 4)]
    torch.library.opcheck(relative_kernel.attention, inputs)
    leaves = [torch.empty(2, 3, 20, size, device="meta", requires_grad=True) for size in (16, 16, 16, 4, 5)]
    with FlopCounterMode(display=False) as forward:
        out = relative_kernel.attention(*leaves)[0]
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return {"forward": forward.get_total_flops(), "backward": backward.get_total_flops()}


def self_check():
    """What the check before the first use measures, of the kernel and of kernels that are wrong in one place."""
    right = relative_kernel.attention

    def wrong_output(*tensors):
        out, total = right(*tensors)
        return out * 1.05, total

    def wrong_gradient(query, key, value, along_h, along_w):
        return right(query, key, value, along_h, along_w.detach() + 0.9 * (along_w - along_w.detach()))

    found = {}
    for kernel in (right, wrong_output, wrong_gradient):
        relative_kernel.attention = kernel
        for dtype in relative.TOLERANCE:
            off = relative.difference(torch.device("cpu"), dtype, 16, 5, 4)
            found[f"{getattr(kernel, '__name__', 'kernel')}, {dtype}"] = [off, relative.TOLERANCE[dtype]]
    relative_kernel.attention = right
    return found


def low_precision(side=64, dim=64):
    """Errors in 16 bits against fp64, one head at 1024 pixels: standard deviation of scaled q.k 2, of a bias 1.6."""
    numbers, grid = torch.Generator().manual_seed(0), (side, side)
    query, key, value = (part.bfloat16() for part in projected(1, 1, side * side, dim, numbers))
    query = query * 2
    tables = [torch.randn(2 * side - 1, dim, generator=numbers) * 0.1 for _ in range(2)]
    probe = torch.randn(query.shape, generator=numbers).bfloat16()

    def of(dtype, of_biases, form):
        leaves = [part.to(dtype).requires_grad_() for part in (query, key, value)]
        leaves += [table.to(torch.promote_types(dtype, torch.float32)).requires_grad_() for table in tables]
        biases = along_axes(leaves[0].to(of_biases), grid, *(table.to(of_biases) for table in leaves[3:]))
        if form is folded:
            out = folded(*leaves[:3], *biases)
        else:
            out = relative_kernel.attention(*leaves[:3], *(bias.float() for bias in biases))[0]
        return [out, *torch.autograd.grad(out, leaves, probe.to(dtype))]

    exact = of(torch.float64, torch.float64, folded)
    forms = {
        "folded, bf16": (torch.bfloat16, torch.bfloat16, folded),
        "folded, fp16": (torch.float16, torch.float16, folded),
        "kernel, bf16, biases bf16": (torch.bfloat16, torch.bfloat16, relative_kernel.attention),
        "kernel, bf16, biases fp32": (torch.bfloat16, torch.float32, relative_kernel.attention),
        "kernel, fp16, biases fp32": (torch.float16, torch.float32, relative_kernel.attention),
    }
    names = ("out", "query", "key", "value", "rel_pos_h", "rel_pos_w")
    return {
        form: {
            name: f"{((a.double() - b).norm() / b.norm()).item():.1e}"
            for name, a, b in zip(names, of(*how), exact, strict=True)
        }
        for form, how in forms.items()
    }


def checks(cases):
    """All of them."""
    correct = {"errors": errors(*cases), "self_check": self_check(), "registered": registered()}
    return {**correct, "compiled": compiled(), "in_an_encoder": in_an_encoder()}


if __name__ == "__main__":
    correct_bfloat16()
    print(json.dumps(low_precision() if sys.argv[1] == "low_precision" else checks(json.loads(sys.argv[1])), indent=1))
