"""The module `mmcv._ext` if no compiled one is installed: imported under that name after `semaim.compat.install()`.

Signatures, outputs written in place and behaviour in edge cases are those of mmcv 2.1.0's C++ (`mmcv/ops/csrc`), as
mmcv.ops calls it. All other operators can be looked up, as mmcv.ops does on import, but raise an error when called.
"""

from collections.abc import Callable
from typing import NoReturn

import torch
import torchvision  # noqa: F401  registers torch.ops.torchvision
from torch import Tensor

from semaim.errors import UserError


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """Indices (K,) int64 of the boxes that greedy suppression keeps, highest score first.

    boxes: (N, 4) x1, y1, x2, y2; scores: (N,); offset: 1 where x2 and y2 are the last pixel, so a width is x2 - x1 + 1.
    """
    dtype = torch.promote_types(boxes.dtype, scores.dtype)
    # torchvision has no CPU kernel for half precision, and mmcv's are all fp32.
    dtype = torch.promote_types(dtype, torch.float32)
    if offset:
        # min(x2 + 1, x2' + 1) - max(x1, x1') is the intersection's width with offset 1, so moving the corners is
        # enough. In fp64 the sum is exact; in fp32 it would round the corners of boxes far from the origin.
        dtype = torch.float64
        boxes = torch.cat([boxes[:, :2].to(dtype), boxes[:, 2:].to(dtype) + offset], dim=1)
    # An overlap equal to the threshold is kept. torchvision compares with a double, and fp32's 3/5 is above 0.6 in it.
    threshold = torch.tensor(iou_threshold, dtype=dtype).item()
    return torch.ops.torchvision.nms(boxes.to(dtype), scores.to(dtype), threshold)


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Average of bilinear samples in each of `aligned_height` x `aligned_width` bins of each box, into `output`.

    input: (B, C, H, W); rois: (N, 5) index in the batch, x1, y1, x2, y2 in pixels of the image; output: (N, C, h, w).
    """
    if pool_mode != 1:
        _missing("roi_align_forward with pool_mode='max'")
    dtype = _kernel_dtype(input)
    rois = rois.to(dtype)
    # On a GPU the compiled kernel checks nothing either, and a check would wait for all queued work.
    if rois.is_cpu:
        _check_rois(rois, input.size(0), spatial_scale, aligned)
    pooled = torch.ops.torchvision.roi_align(
        input.to(dtype), rois, spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned
    )
    output.copy_(pooled)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Add the gradient of `roi_align_forward`'s input to `grad_input`: (B, C, H, W); grad_output: (N, C, h, w)."""
    dtype = _kernel_dtype(grad_output)
    gradient = torch.ops.torchvision._roi_align_backward(
        grad_output.to(dtype),
        rois.to(dtype),
        spatial_scale,
        aligned_height,
        aligned_width,
        *grad_input.shape,
        sampling_ratio,
        aligned,
    )
    grad_input += gradient


def get_compiler_version() -> str:
    """For the report of `mmcv.utils.collect_env`, which calls both of these functions."""
    return "none: torchvision's operators stand in"


get_compiling_cuda_version = get_compiler_version


def _kernel_dtype(values: Tensor) -> torch.dtype:
    """torchvision has no kernels for bf16, and its fp16 ones round coordinates: both are computed in fp32."""
    return torch.promote_types(values.dtype, torch.float32)


def _check_rois(rois: Tensor, batch: int, spatial_scale: float, aligned: bool) -> None:
    """Refuse boxes that only mmcv's CPU kernel refuses, and boxes for which both kernels read out of bounds."""
    start, end = (rois[:, 1:] * spatial_scale - 0.5).chunk(2, dim=1)
    if aligned and not (end - start >= 0).all():  # written so that NaN is refused, too
        raise RuntimeError("roi_align: boxes of negative or undefined size; x1 <= x2 and y1 <= y2 are needed")
    index = rois[:, 0].trunc()
    if not ((index >= 0) & (index < batch)).all():
        raise RuntimeError(f"roi_align: boxes of images outside the batch; the index must be in [0, {batch})")


def _missing(name: str) -> NoReturn:
    raise UserError(
        f"mmcv-lite has no compiled operators, and torchvision's do not replace {name}: "
        "install a compiled mmcv >= 2.0, < 2.2 in place of mmcv-lite"
    )


def __getattr__(name: str) -> Callable[..., NoReturn]:
    # Python's own look-ups (`__path__`, `__wrapped__`, `_...`) still have to fail.
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def operator(*args, **kwargs) -> NoReturn:
        _missing(name)

    operator.__name__ = operator.__qualname__ = name
    return operator
