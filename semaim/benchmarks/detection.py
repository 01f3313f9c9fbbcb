"""ViTDet's global block, and Mask R-CNN's training step with it, against attention with a bias for all pairs."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from semaim.benchmarks.baselines import plain_map_attention, plain_mlp, plain_norm
from semaim.benchmarks.measuring import alternate, check_equal, cpu_peak, gpu_peak
from semaim.benchmarks.rows import Row, without_gpu
from semaim.engine.precision import autocast
from semaim.errors import UserError
from semaim.models.relative import find_fault
from semaim.models.vit import SIZES, Block
from semaim.models.vitdet import MapAttention
from semaim.places import own_config, to_install


def build_block(model: str, img_size: int, batch: int, device: str) -> tuple[Block, Tensor]:
    """A global block with nonzero relative positions, and a map (B, H, W, D) for it."""
    torch.manual_seed(0)
    if img_size < 16 or img_size % 16:
        raise UserError(f"--img-size {img_size}: give a multiple of 16")
    dim, heads, side = SIZES[model]["embed_dim"], SIZES[model]["num_heads"], img_size // 16
    block = Block(dim, heads, attention=functools.partial(MapAttention, table=(side, side)))
    attention = cast(MapAttention, block.attn)
    for table in (attention.rel_pos_h, attention.rel_pos_w):
        torch.nn.init.normal_(table, std=0.2)
    return block.to(device), torch.randn(batch, side, side, dim, device=device)


def plain_block(block: Block, maps: Tensor) -> Tensor:
    """The same block, unfused."""
    maps = maps + plain_map_attention(cast(MapAttention, block.attn), plain_norm(maps, block.norm1))
    return maps + plain_mlp(plain_norm(maps, block.norm2), block.mlp)


def block_pass(
    variant: str, block: Block, maps: Tensor, precision: str = "fp32"
) -> Callable[[], tuple[Tensor, tuple[Tensor, ...]]]:
    """Forward and backward of "ours" or the "baseline": returns the output and the gradients of maps and weights."""
    maps = maps.requires_grad_()
    weights = [maps, *block.parameters()]

    def work() -> tuple[Tensor, tuple[Tensor, ...]]:
        with autocast(maps.device, precision):
            out = block(maps) if variant == "ours" else plain_block(block, maps)
        return out, torch.autograd.grad(out, weights, torch.ones_like(out))

    return work


def build_pass(variant: str, *sizes) -> Callable:
    """`block_pass` of a new block, for a separate process."""
    return block_pass(variant, *build_block(*sizes))


def vitdet(
    model: str = "base",
    img_size: int = 512,
    batch: int = 1,
    device: str = "cpu",
    precision: str = "fp32",
    repeats: int = 5,
) -> list[Row]:
    """Time and memory of one global block, forward and backward."""
    where = "GPU" if device == "cuda" else "CPU"
    block, maps = build_block(model, img_size, batch, device)
    ours, plain = (block_pass(variant, block, maps) for variant in ("ours", "baseline"))
    (a, of_a), (b, of_b) = ours(), plain()
    difference = check_equal("outputs", [a], [b], 1e-5)
    check_equal("gradients", of_a, of_b, 1e-3)
    del a, b, of_a, of_b
    ours, plain = (block_pass(variant, block, maps, precision) for variant in ("ours", "baseline"))
    if where == "GPU":
        peaks = [gpu_peak(work, torch.device(device)) for work in (ours, plain)]
    else:
        sizes = model, img_size, batch, device
        peaks = [cpu_peak(build_pass, variant, *sizes) for variant in ("ours", "baseline")]
    timing = alternate(ours, plain, torch.device(device), repeats, warmup=2)
    details = {"model": model, "img_size": img_size, "batch": batch, "precision": precision, "repeats": repeats}
    common: dict[str, Any] = {"loss_difference": difference, "details": details}
    counts = where == "GPU" and img_size == 1024  # the case that the targets are for
    rows = [
        Row(
            f"ViTDet global block, ViT-{model} {img_size} px, forward + backward", where, "ms", 2.0 if counts else None,
            ours=timing.ours * 1e3, baseline=timing.baseline * 1e3, ratio=timing.ratio, spread=timing.spread, **common,
        ),
        Row(
            "its peak memory", where, "MB", 0.3 if counts else None, at_least=False, ours=peaks[0] / 1e6,
            baseline=peaks[1] / 1e6, ratio=peaks[0] / peaks[1], **common,
        ),
    ]  # fmt: skip
    if where == "GPU":
        rows += kernel_rows(block, maps, precision, repeats, details)
    if where == "CPU":
        rows += [
            without_gpu("ViTDet global block at 1024 px, forward + backward", "ms", 2.0),
            without_gpu("its peak memory", "MB", 0.3, at_least=False),
        ]
    return rows


def kernel_rows(block: Block, maps: Tensor, precision: str, repeats: int, details: dict) -> list[Row]:
    """The same block by Triton's kernel (`rel_pos_kernel="triton"`), beside the folded form as the baseline."""
    names = "the same block by Triton's kernel against the folded form", "its peak memory"
    other, attention = copy.deepcopy(block), cast(MapAttention, block.attn)
    cast(MapAttention, other.attn).kernel = "triton"
    channels, side = maps.shape[-1] // attention.num_heads, maps.shape[1]
    for dtype in (torch.float32, torch.bfloat16):  # as compared, as timed
        if fault := find_fault(maps.device, dtype, channels, 5 if side % 16 else 16, side):
            missing: dict[str, Any] = {"details": {"reason": fault}}
            return [Row(names[0], "GPU", "ms", **missing), Row(names[1], "GPU", "MB", **missing)]
    (a, of_a), (b, of_b) = (block_pass("ours", one, maps)() for one in (other, block))
    common: dict[str, Any] = {"loss_difference": check_equal("outputs", [a], [b], 1e-5), "details": details}
    check_equal("gradients", of_a, of_b, 1e-3)
    del a, b, of_a, of_b
    kernel, folded = (block_pass("ours", one, maps, precision) for one in (other, block))
    timing = alternate(kernel, folded, maps.device, repeats, warmup=2)
    peaks = [gpu_peak(work, maps.device) / 1e6 for work in (kernel, folded)]
    return [
        Row(
            names[0], "GPU", "ms", ours=timing.ours * 1e3, baseline=timing.baseline * 1e3, ratio=timing.ratio,
            spread=timing.spread, **common,
        ),
        Row(names[1], "GPU", "MB", ours=peaks[0], baseline=peaks[1], ratio=peaks[0] / peaks[1], **common),
    ]  # fmt: skip


@contextmanager
def plain_blocks() -> Iterator[None]:
    """Context manager in which all blocks of ViTDet run as `plain_block`, windowed ones included."""

    def forward(block: Block, x: Tensor, context: None, causal: bool) -> Tensor:
        x = x + block.drop_path(block.attn(plain_norm(x, block.norm1)))
        return x + block.drop_path(plain_mlp(plain_norm(x, block.norm2), block.mlp))

    with patch.object(Block, "_forward", forward), patch.object(MapAttention, "attend", plain_map_attention):
        yield


def build_detector(model: str, img_size: int, device: str) -> Any:
    """The recipe's Mask R-CNN for square images of any size."""
    from mmengine.registry import MODELS

    from semaim.engine.config import load_config
    from semaim.engine.dense import build, enter

    options = {"model.backbone.size": model, "model.backbone.img_size": img_size, "model.backbone.drop_path_rate": 0.0}
    cfg = load_config(own_config("mmdet_configs/semaim_mask_rcnn.py"), options)
    cfg.model.neck.in_channels = SIZES[model]["embed_dim"]
    cfg.model.data_preprocessor.side = img_size
    enter(cfg)
    torch.manual_seed(0)
    return build(cfg.model, MODELS, "model").to(device).train()


def noise_batch(img_size: int, batch: int, objects: int = 8) -> dict:
    """Images of noise with boxes and masks at random places, in the format of mmdet's data sets."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    numbers = np.random.default_rng(0)
    inputs, samples = [], []
    for _ in range(batch):
        start = numbers.uniform(0, 0.6, (objects, 2))
        boxes = np.concatenate([start, start + numbers.uniform(0.1, 0.4, (objects, 2))], axis=1) * img_size
        masks = np.zeros((objects, img_size, img_size), np.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.astype(int), strict=True):
            mask[top:bottom, left:right] = 1
        sample = DetDataSample(
            metainfo={"img_shape": (img_size, img_size), "ori_shape": (img_size, img_size), "scale_factor": (1.0, 1.0)}
        )
        sample.gt_instances = InstanceData(
            bboxes=HorizontalBoxes(torch.from_numpy(boxes).float()),
            labels=torch.from_numpy(numbers.integers(0, 80, objects)),
            masks=BitmapMasks(masks, img_size, img_size),
        )
        inputs.append(torch.from_numpy(numbers.integers(0, 256, (3, img_size, img_size), dtype=np.uint8)))
        samples.append(sample)
    return {"inputs": inputs, "data_samples": samples}


def mask_rcnn(
    model: str, img_size: int, batch: int, device: str, precision: str, repeats: int, anyway: bool = False
) -> list[Row]:
    """Mask R-CNN's training step and its memory; on a CPU only with `anyway`."""
    name = "Mask R-CNN ViT-base training step at 1024 px"
    missing = [
        without_gpu(name, "images/s", 1.5),
        without_gpu("its peak memory at 1 image", "GB", 8.0, at_least=False, of_ours=True),
    ]
    if device != "cuda" and not anyway:
        return missing
    if find_spec("mmdet") is None:
        if anyway:
            raise UserError(f"--mask-rcnn: mmdet is not installed: {to_install('det')}")
        for row in missing:
            row.details["reason"] = "mmdet is not installed"
        return missing
    detector = build_detector(model, img_size, device)
    data = noise_batch(img_size, batch)

    def losses(precision: str) -> dict[str, Tensor]:
        torch.manual_seed(0)  # for the sampling of boxes
        with autocast(device, precision):
            return detector(**detector.data_preprocessor(copy.deepcopy(data), True), mode="loss")

    def step(optimizer: torch.optim.Optimizer) -> None:
        loss, _ = detector.parse_losses(losses(precision))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def plain_step(optimizer: torch.optim.Optimizer) -> None:
        with plain_blocks():
            step(optimizer)

    with torch.no_grad():
        found = losses("fp32")
        with plain_blocks():
            expected = losses("fp32")
    # Only the losses of the proposals: the sampling for the heads may depend on rounding.
    of_proposals = [[t for k, v in one.items() if "rpn" in k for t in v] for one in (found, expected)]
    difference = check_equal("proposal losses", of_proposals[0], of_proposals[1], 1e-3)
    fused = torch.optim.AdamW(detector.parameters(), lr=1e-5, fused=True)
    default = torch.optim.AdamW(detector.parameters(), lr=1e-5)
    target = torch.device(device)
    timing = alternate(lambda: step(fused), lambda: plain_step(default), target, repeats, warmup=2)
    where = "GPU" if device == "cuda" else "CPU"
    counts = where == "GPU" and img_size == 1024
    common: dict[str, Any] = {
        "loss_difference": difference,
        "details": {"batch": batch, "precision": precision, "repeats": repeats},
    }
    rows = [
        Row(
            f"Mask R-CNN ViT-{model} training step at {img_size} px, batch {batch}", where, "images/s",
            1.5 if counts else None, ours=batch / timing.ours, baseline=batch / timing.baseline, ratio=timing.ratio,
            spread=timing.spread, **common,
        )
    ]  # fmt: skip
    if device == "cuda":
        del default
        ours = gpu_peak(lambda: step(fused), target) / 1e9
        rows.append(
            Row(
                f"its peak memory at {batch} image{'s' * (batch > 1)}", "GPU", "GB",
                8.0 if counts and batch == 1 else None, at_least=False, of_ours=True, ours=ours, **common,
            )
        )  # fmt: skip
    return rows
