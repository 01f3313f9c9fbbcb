"""The pretraining step and the attention in it, against the formulation with explicit masks."""

import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import OPTIM_WRAPPERS, OPTIMIZERS
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from semaim.benchmarks.baselines import ExplicitMasks, published_step, unfused_attention
from semaim.benchmarks.measuring import (
    alternate,
    check_equal,
    cpu_peak,
    gpu_peak,
    matmul_rate,
    ratio_of,
    take_turns,
)
from semaim.benchmarks.references import official_loss, official_model, official_step
from semaim.benchmarks.rows import Row, without_gpu
from semaim.engine.compiling import compile_blocks
from semaim.engine.config import CONFIGS
from semaim.engine.optim import fuse, group_parameters
from semaim.engine.precision import autocast
from semaim.errors import UserError
from semaim.models import PixelTarget, SemAIM, cpu_products
from semaim.models.vit import SIZES

#: Largest relative differences between ours and the baseline, both in fp32, before anything is timed.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-3

#: PyTorch's attention kernels, compared with the one it chooses.
KERNELS = {
    "GPU": (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION),
    "CPU": (),  # there is one fused kernel
}


COMPILED = "the same, blocks compiled, as in long trainings on a GPU"


@dataclass(frozen=True)
class Setting:
    """The setting of a measured step: encoder size, images per step and their side, device, precision of ours."""

    model: str = "small"
    batch: int = 16
    img_size: int = 224
    patch_size: int = 16
    device: str = "cpu"
    precision: str = "fp32"
    order: str = "semantic"
    depth: int | None = None  #: of the encoder, overriding the size's
    compile: bool = False  #: also ours with compiled blocks, as `compile=True` of a config
    reference: str | None = None  #: folder of a clone of the official code

    def build(self) -> tuple[SemAIM, Tensor, Tensor]:
        """The recipe's model, noise images and draws; always the same."""
        torch.manual_seed(0)
        try:
            patch = (self.patch_size, self.patch_size)
            depth = self.depth or SIZES[self.model]["depth"]
            with torch.device(self.device):
                model = SemAIM(
                    PixelTarget(patch),
                    size=self.model,
                    img_size=self.img_size,
                    patch_size=patch,
                    order=self.order,
                    depth=self.depth,
                    decoder_depth=None if depth % 12 else 12,  # the official default, where it divides the depth
                )
        except ValueError as error:
            raise UserError(str(error)) from None
        images = torch.randn(self.batch, 3, self.img_size, self.img_size, device=self.device)
        draw = torch.rand(self.batch, math.prod(model.grid), device=self.device)
        return model, images, draw


def recipe() -> Config:
    """The pretraining recipe, for its optimizer."""
    return Config.fromfile(CONFIGS / "_base_" / "pretrain.py")


def groups_of(model: SemAIM) -> list[dict]:
    """The recipe's optimizer groups with the keys that torch's optimizers accept."""
    optimizer = recipe().optim_wrapper.optimizer
    groups = group_parameters(model.named_parameters(), 1e-4, optimizer.weight_decay)
    return [{name: group[name] for name in ("params", "lr", "weight_decay")} for group in groups]


def our_step(
    model: torch.nn.Module, images: Tensor, draw: Tensor, precision: str, compile: bool = False
) -> Callable[[], Tensor]:
    """A training step as in the runner: autocast, backward, and the recipe's optimizer wrapper."""
    if compile:
        compile_blocks(model)
    wrapper = recipe().optim_wrapper.to_dict()
    wrapper.pop("constructor")
    network: Any = getattr(model, "module", model)
    optimizer = OPTIMIZERS.build(fuse({"lr": 1e-4, **wrapper.pop("optimizer"), "params": groups_of(network)}))
    wrapper = OPTIM_WRAPPERS.build({**wrapper, "optimizer": optimizer})

    def step() -> Tensor:
        with autocast(images.device, precision):
            loss = model(images, draw).loss
        wrapper.update_params(loss)
        return loss.detach()

    return step


def build_step(variant: str, setting: Setting) -> Callable[[], object]:
    """The step of a variant, with a new model.

    Args:
        variant: "ours", "ours, compiled", "ours, order in fp32", "baseline" (explicit masks), "official" (code).
        setting: its `reference` is the official code.
    """
    model, images, draw = setting.build()
    if variant == "baseline":
        betas = recipe().optim_wrapper.optimizer.betas
        return published_step(ExplicitMasks(model), images, draw, groups_of(model), betas)
    if variant == "official":
        assert setting.reference is not None
        return official_step(setting.reference, official_model(setting.reference, model), images)
    if variant == "ours, order in fp32":
        model.look_precision = "fp32"
    return our_step(model, images, draw, setting.precision, variant == "ours, compiled")


def check_parity(model: SemAIM, images: Tensor, draw: Tensor, reference: str | None = None) -> dict[str, float]:
    """Largest relative differences of loss and gradients from ours, all in fp32.

    Args:
        model: whose weights all forms have.
        images, draw: (B, 3, H, W) and (B, L).
        reference: folder of the official code, which is then compared, too.

    Raises:
        UserError: a form gives another loss or other gradients.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    # The official code adds 1e-3 * draw to distances up to 18 in fp32: it keeps apart numbers that differ by 2e-3.
    draw = (draw.argsort(dim=-1).argsort(dim=-1) + 0.5) / draw.shape[-1]
    forms = {"ours": (lambda: model(images, draw).loss, trained)}
    forms["the baseline"] = (lambda: ExplicitMasks(model)(images, draw), trained)
    if reference is not None:
        official = official_model(reference, model)
        forms["the official code"] = (lambda: official_loss(official, images, draw), dict(official.named_parameters()))
    found = {}
    for form, (loss_of, parameters) in forms.items():
        loss = loss_of()
        found[form] = [loss.detach()], torch.autograd.grad(loss, [parameters[name] for name in trained])
    losses, gradients = found.pop("ours")
    differences = {"loss": 0.0, "gradients": 0.0}
    for form, theirs in found.items():
        for kind, ours, other, tolerance in (
            ("loss", losses, theirs[0], LOSS_TOLERANCE),
            ("gradients", gradients, theirs[1], GRADIENT_TOLERANCE),
        ):
            what = "losses" if kind == "loss" else kind
            differences[kind] = max(differences[kind], check_equal(what, ours, other, tolerance, form))
    return differences


def step_flops(step: Callable[[], object]) -> int:
    """Multiplications and additions of a step's matrix products, convolutions and attention, forward and backward.

    Attention counts in full, including the masked half. oneDNN is off here, as its products are not counted.
    """
    with patch.object(cpu_products, "ONE_DNN", False), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def pretrain(setting: Setting, repeats: int = 5) -> list[Row]:
    """Time, memory and, on a GPU, the share of its matmul rate; with `setting.reference` beside the official code."""
    device = torch.device(setting.device)
    where = "GPU" if device.type == "cuda" else "CPU"
    model, images, draw = setting.build()
    difference = check_parity(model, images[:4], draw[:4], setting.reference)
    details = {**asdict(setting), "gradient_difference": difference["gradients"], "repeats": repeats}
    common: dict[str, Any] = {"loss_difference": difference["loss"], "details": details}
    variants = ["ours", "baseline"] + ["ours, compiled"] * setting.compile
    variants += ["ours, order in fp32"] * (setting.precision == "bf16") + ["official"] * bool(setting.reference)

    flops = 0
    if where == "GPU":
        # Counted before the blocks are compiled: the counter does not see operations in compiled blocks.
        flops = step_flops(our_step(model, images, draw, setting.precision))
        del model, images, draw
        torch.cuda.empty_cache()
        peaks = {}
        for name in variants:
            step = build_step(name, setting)
            for _ in range(3):  # optimizer state; loss scaling may leave out the first steps
                step()
            peaks[name] = gpu_peak(step, device)
            del step
            torch.cuda.empty_cache()
    else:
        peaks = {name: cpu_peak(build_step, name, setting) for name in variants}

    works = [build_step(name, setting) for name in variants]
    turns = take_turns(works, device, repeats, warmup=3 if where == "GPU" else 1)
    times = dict(zip(variants, zip(*turns, strict=True), strict=True))
    what = f"pretraining step, ViT-{setting.model} {setting.img_size} px, batch {setting.batch}"
    rows = []
    for ours, theirs, title in (
        ("ours", "baseline", what),
        ("ours, compiled", "baseline", COMPILED),
        ("ours, order in fp32", "baseline", "the same, order pass in fp32"),
        ("ours", "official", "the same, against the official code"),
        ("ours, order in fp32", "official", "the same, order pass in fp32, against the official code"),
        ("baseline", "official", "explicit masks, against the official code"),
    ):
        if ours not in times or theirs not in times:
            continue
        timing = ratio_of(times[ours], times[theirs])
        targets = ((3.0, 0.5) if where == "GPU" else (1.2, 0.7)) if title in (what, COMPILED) else (None, None)
        rows += [
            Row(
                title, where, "images/s", targets[0], ours=setting.batch / timing.ours,
                baseline=setting.batch / timing.baseline, ratio=timing.ratio, spread=timing.spread, **common,
            ),
            Row(
                "its peak memory", where, "MB", targets[1], at_least=False, ours=peaks[ours] / 1e6,
                baseline=peaks[theirs] / 1e6, ratio=peaks[ours] / peaks[theirs], **common,
            ),
        ]  # fmt: skip
    if where == "CPU":
        return rows + [
            without_gpu("pretraining step, ViT-base 224 px", "images/s", 3.0),
            without_gpu("its peak memory", "MB", 0.5, at_least=False),
            without_gpu("share of the card's measured bf16 matmul rate", "", 0.5, of_ours=True),
        ]
    best = matmul_rate(device, torch.bfloat16)
    for name in ("ours", "ours, compiled"):
        if name in times:
            used = flops / statistics.median(times[name])
            rate = {"matmul_tflops": best / 1e12, "step_tflops": used / 1e12, **details}
            title = f"share of the card's measured bf16 matmul rate, {name}"
            rows.append(Row(title, where, "", 0.5, of_ours=True, ours=used / best, details=rate))
    return rows


def attention(setting: Setting, repeats: int = 5) -> list[Row]:
    """Attention alone, forward and backward: fused, causal against separate operations; on a GPU also each kernel."""
    device = torch.device(setting.device)
    where = "GPU" if device.type == "cuda" else "CPU"
    dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
    dim, heads = (SIZES[setting.model][name] for name in ("embed_dim", "num_heads"))
    rows = []

    def add(what: str, works: list[Callable], tolerance: float) -> None:
        found, wanted = (work() for work in works)
        difference = check_equal(f"gradients of {what}", found, wanted, tolerance)
        timing = alternate(works[0], works[1], device, repeats, warmup=2, inner=4)
        rows.append(
            Row(
                what, where, "ms", ours=timing.ours * 1e3, baseline=timing.baseline * 1e3, ratio=timing.ratio,
                spread=timing.spread, loss_difference=difference, details={"dtype": str(dtype), "width": dim},
            )
        )  # fmt: skip

    for side in sorted({7, 14, 28, setting.img_size // setting.patch_size}):
        fused, plain = attention_pair(setting.batch, side * side, dim, heads, device, dtype)
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        check_equal("attention", [fused()], [plain()], tolerance)
        ours = functools.partial(gradients, fused)
        what = f"causal attention, {side * side} tokens, {heads} heads, batch {setting.batch}"
        add(what, [ours, functools.partial(gradients, plain)], 10 * tolerance)
        for kernel in KERNELS[where]:
            named = functools.partial(by_kernel, kernel, fused)
            try:
                named()
            except RuntimeError:
                continue  # not available on this card or in this precision
            add(f"the same by {kernel.name.lower()}, against PyTorch's choice", [named, ours], 10 * tolerance)
    return rows


@dataclass(frozen=True)
class OfInputs:
    """A computation, and its input tensors."""

    work: Callable[[], Tensor]
    inputs: list[Tensor]

    def __call__(self) -> Tensor:
        """Compute it."""
        return self.work()


def by_kernel(kernel: SDPBackend, work: OfInputs) -> tuple[Tensor, ...]:
    """`gradients` with one of PyTorch's attention kernels."""
    with sdpa_kernel(kernel):
        return gradients(work)


def attention_pair(
    batch: int, tokens: int, dim: int, heads: int, device: torch.device, dtype: torch.dtype
) -> tuple[OfInputs, OfInputs]:
    """Fused and unfused causal attention of the same queries, keys and values: two functions that return (B, N, D)."""
    generator = torch.Generator(device).manual_seed(0)
    inputs = [torch.randn(batch, tokens, dim, generator=generator, device=device, dtype=dtype) for _ in range(3)]
    inputs = [t.requires_grad_() for t in inputs]
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    mask = torch.zeros(batch, 1, tokens, tokens, device=device).masked_fill_(~seen, float("-inf"))

    def fused() -> Tensor:
        query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in inputs)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)

    def plain() -> Tensor:
        query, key, value = inputs
        return unfused_attention(query, key, value, heads, mask)

    return OfInputs(fused, inputs), OfInputs(plain, inputs)


def gradients(work: OfInputs) -> tuple[Tensor, ...]:
    """Forward and backward of a function of `attention_pair`."""
    out = work()
    return torch.autograd.grad(out, work.inputs, torch.ones_like(out))
