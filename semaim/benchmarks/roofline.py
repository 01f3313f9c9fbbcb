"""The least time that a card needs for a training step, from a count of every operation: no GPU is used.

An operation takes at least its bytes over the card's memory rate, and at least its multiplications over its matrix
rate. The sum over the step is its ideal time: what overlaps, caches or waiting change is left out. It says which
change can pay, and how much, before the change is made.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, cast
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from semaim.benchmarks.baselines import ExplicitMasks, plain_biased_attention
from semaim.benchmarks.counting import Count, CudaAutocast, Work, as_on_a_gpu, counted_compile
from semaim.benchmarks.detection import plain_blocks
from semaim.benchmarks.pretraining import Setting, groups_of
from semaim.engine.compiling import blocks_of
from semaim.errors import UserError
from semaim.models import relative, segvit
from semaim.models.vitdet import MapAttention, SimpleFeaturePyramid, ViTDet


@dataclass(frozen=True)
class Card:
    """What a card reaches in practice.

    Attributes:
        bandwidth: of its memory, bytes per second.
        low, full: multiplications and additions per second of bf16 products with fp32 sums, and of fp32 products.
    """

    bandwidth: float
    low: float
    full: float

    def seconds(self, work: Work) -> float:
        """The least time of an operation."""
        rate = self.full if work.dtype == torch.float32 else self.low
        return max(work.bytes / self.bandwidth, work.flops / rate)


def _card(bandwidth: float, low: float, full: float) -> Card:
    """A card from NVIDIA's data sheet, in TB/s and dense TFLOP/s.

    Large copies reach 0.9 of the sheet's memory rate. Products reach 0.68 of its bf16 rate on an H200 (671 of 989
    TFLOP/s) and about 0.75 of the fp32 one; the same shares are taken for the others.
    """
    return Card(0.9 * bandwidth * 1e12, 0.68 * low * 1e12, 0.75 * full * 1e12)


CARDS = {
    "h200": _card(4.8, 989, 67),
    "h100": _card(3.35, 989, 67),
    "a100": _card(2.04, 312, 19.5),
    "4090": _card(1.01, 165, 82.6),
}


@dataclass
class Form:
    """One form of a step: `loss` builds the loss in autocast to `dtype`; `compile` says whether blocks are compiled."""

    name: str
    loss: Callable[[], Tensor]
    dtype: torch.dtype = torch.bfloat16
    compile: bool = False
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


@dataclass
class Counted:
    """What was counted of a form, and its ideal time on a card."""

    form: str
    works: list[Work]
    kept: int  #: bytes kept for the backward pass, without weights and inputs
    images: int
    card: Card

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return sum(map(self.card.seconds, self.works))

    @property
    def flops(self) -> int:
        """Of the whole step."""
        return sum(work.flops for work in self.works)

    @property
    def bytes(self) -> int:
        """Of the whole step."""
        return sum(work.bytes for work in self.works)

    def by_kind(self) -> dict[str, float]:
        """Seconds of each kind of work, longest first."""
        seconds: dict[str, float] = defaultdict(float)
        for work in self.works:
            seconds[work.kind] += self.card.seconds(work)
        return dict(sorted(seconds.items(), key=lambda item: -item[1]))

    def longest(self, most: int = 10) -> list[tuple[Work, int, float]]:
        """The operations of a name, shape and dtype that take longest together: an example, their number, seconds."""
        alike: dict[tuple, list[Work]] = defaultdict(list)
        for work in self.works:
            alike[work.name, work.shape, work.dtype].append(work)
        summed = [(works[0], len(works), sum(map(self.card.seconds, works))) for works in alike.values()]
        return sorted(summed, key=lambda item: -item[2])[:most]


def count(network: nn.Module, inputs: list[Tensor], groups: list[dict], form: Form, card: Card) -> Counted:
    """Count a training step: forward, backward and the fused AdamW. Everything is on a CPU's fake tensors."""
    optimizer = torch.optim.AdamW(groups, fused=True)
    given = {tensor.untyped_storage()._cdata for tensor in [*network.parameters(), *network.buffers(), *inputs]}
    counted = Count(given=given)
    compiled = counted_compile(blocks_of(network), counted) if form.compile else CudaAutocast()
    with counted, compiled, form.context():
        with torch.autocast("cpu", form.dtype), counted.keeping():
            loss = form.loss()
        loss.backward()
        optimizer.step()
    network.zero_grad()
    return Counted(form.name, counted.works, sum(counted.kept.values()), len(inputs[0]), card)


def pretraining(model: str, batch: int, img_size: int) -> Iterator[tuple[nn.Module, list[Tensor], list[dict], Form]]:
    """The forms of the pretraining step."""
    network, images, draw = Setting(model, batch, img_size).build()
    masks = ExplicitMasks(network)

    def ours() -> Tensor:
        return network(images, draw).loss

    def looking_in_fp32() -> contextlib.AbstractContextManager:
        return patch.object(network, "look_precision", "fp32")

    for form in (
        Form("explicit masks", lambda: masks(images, draw), torch.float16),
        Form("ours", ours),
        Form("ours, compiled", ours, compile=True),
        Form("ours, order pass in fp32", ours, context=looking_in_fp32),
    ):
        yield network, [images, draw], groups_of(network), form


def dense(network: nn.Module, batch: int, img_size: int, plain: Callable) -> Iterator:
    """The forms of a dense encoder's step; its loss is the mean of its maps."""
    images = torch.randn(batch, 3, img_size, img_size)

    def loss() -> Tensor:
        maps = network(images)
        return torch.stack([one.float().mean() for one in maps]).sum()

    groups = [{"params": [p for p in network.parameters() if p.requires_grad], "lr": 1e-4}]
    for form in (
        Form("a bias for all pairs, separate operations", loss, context=plain),
        Form("ours", loss),
        Form("ours, compiled", loss, compile=True),
    ):
        yield network, [images], groups, form


def vitdet(model: str, batch: int, img_size: int) -> Iterator:
    """The forms of ViTDet's encoder and pyramid: relative positions folded into the heads, or by the kernel."""
    encoder = ViTDet(model, img_size)
    network = nn.Sequential(encoder, SimpleFeaturePyramid(encoder.embed_dim))
    yield from dense(network, batch, img_size, plain_blocks)
    *_, (_, inputs, groups, form) = dense(network, batch, img_size, plain_blocks)
    for index in encoder.global_blocks:
        cast(MapAttention, encoder.blocks[index].attn).kernel = "triton"
    yield network, inputs, groups, replace(form, name="ours, compiled, with the kernel", context=kernel_is_there)


def kernel_is_there() -> contextlib.AbstractContextManager:
    """As on a GPU on which the kernel for relative positions runs."""
    return patch.object(relative, "works", lambda *_: True)


def upernet(model: str, batch: int, img_size: int) -> Iterator:
    """The forms of UperNet's encoder."""

    def plain() -> contextlib.AbstractContextManager:
        return patch.object(segvit.BiasedAttention, "forward", plain_biased_attention)

    yield from dense(segvit.SegmentationViT(model, img_size), batch, img_size, plain)


#: step -> its forms, default batch and image side.
STEPS: dict[str, tuple[Callable[[str, int, int], Iterator], int, int]] = {
    "pretrain": (pretraining, 256, 224),
    "vitdet": (vitdet, 1, 1024),
    "upernet": (upernet, 2, 512),
}


def roofline(step: str, model: str, batch: int | None, img_size: int | None, card: str) -> list[Counted]:
    """Count every form of a step.

    Args:
        step: a key of `STEPS`.
        model: a name of `SIZES`.
        batch, img_size: images of a step and their side in pixels; None for the step's defaults.
        card: a key of `CARDS`.
    """
    forms, usual_batch, usual_size = STEPS[step]
    batch, img_size = batch or usual_batch, img_size or usual_size
    multiple = 16 if step == "pretrain" else 32  # a pyramid has a map of 1/32
    if img_size % multiple:
        raise UserError(f"--img-size {img_size}: give a multiple of {multiple}")
    with FakeTensorMode(allow_non_fake_inputs=True), as_on_a_gpu():
        return [
            count(network, inputs, groups, form, CARDS[card])
            for network, inputs, groups, form in forms(model, batch, img_size)
        ]


def summary(counted: list[Counted]) -> list[dict[str, Any]]:
    """A row for each form, as plain values: TFLOP, GB, ms, images a second, ms by kind, GB kept, share of the first."""
    return [
        {
            "form": one.form,
            "tflop": one.flops / 1e12,
            "gigabytes": one.bytes / 1e9,
            "ideal_ms": 1e3 * one.seconds,
            "images_per_second": one.images / one.seconds,
            "kept_gigabytes": one.kept / 1e9,
            "kept_share": one.kept / counted[0].kept,
            "ms_by_kind": {kind: 1e3 * seconds for kind, seconds in one.by_kind().items()},
            "longest": [
                {**asdict(work), "dtype": str(work.dtype).removeprefix("torch."), "count": number, "ms": 1e3 * seconds}
                for work, number, seconds in one.longest()
            ],
        }
        for one in counted
    ]


def show(rows: list[dict[str, Any]]) -> None:
    """Print the forms, the time of each kind of work, and the ten longest operations of ours and of ours compiled."""
    console = Console()
    console = Console(width=max(console.width, 150))
    table = Table("form", "TFLOP", "GB moved", "ideal ms", "images/s", "GB kept", "share kept")
    for row in rows:
        numbers = row["tflop"], row["gigabytes"], row["ideal_ms"], row["images_per_second"], row["kept_gigabytes"]
        table.add_row(row["form"], *(f"{number:,.1f}" for number in numbers), f"{row['kept_share']:.2f}")
    console.print(table)
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["ms_by_kind"]))
    table = Table("ideal ms", *(row["form"] for row in rows))
    for kind in kinds:
        table.add_row(kind, *(f"{row['ms_by_kind'].get(kind, 0):.1f}" for row in rows))
    console.print(table)
    for row in rows[1:3]:
        table = Table(f"longest operations: {row['form']}", "shape", "dtype", "number", "ms", "GB each")
        for one in row["longest"]:
            shape = " x ".join(map(str, one["shape"]))
            figures = str(one["count"]), f"{one['ms']:.2f}", f"{one['bytes'] / 1e9:.2f}"
            table.add_row(one["name"][:70], shape, one["dtype"], *figures)
        console.print(table)
