"""Cost against the number of tokens and images, and against the number of processes."""

import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from semaim.benchmarks.measuring import seconds
from semaim.benchmarks.pretraining import Setting, attention_pair, gradients, our_step
from semaim.benchmarks.rows import Row
from semaim.engine.launcher import join, launched, leave, spawn
from semaim.errors import UserError, writing
from semaim.models.ordering import make_order

PATCH = 8  #: pixels; small, so that many tokens are few pixels


def measure(setting: Setting, repeats: int) -> dict[str, float]:
    """Seconds of a whole step, of the attention in it, of the rest, and of making the order."""
    device = torch.device(setting.device)
    model, images, draw = setting.build()
    step = our_step(model, images, draw, setting.precision)
    dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
    fused, _ = attention_pair(setting.batch, draw.shape[1], model.embed_dim, model.num_heads, device, dtype)

    def attention() -> None:  # of one layer: order pass, content and query stream
        with torch.no_grad():
            fused()
        for _ in range(2):
            gradients(fused)

    similarity = torch.rand_like(draw)
    times: dict[str, list[float]] = {"step": [], "attention": [], "order": []}
    for turn in range(repeats + 1):
        found = {
            "step": seconds(step, device),
            "attention": seconds(attention, device) * model.depth,
            "order": seconds(lambda: make_order("semantic", similarity, model.grid, draw), device),
        }
        if turn:  # the first turn is warm-up
            for name, value in found.items():
                times[name].append(value)
    found = {name: statistics.median(values) for name, values in times.items()}
    return {**found, "rest": max(found["step"] - found["attention"], 0.0)}


def exponent(sizes: list[int], times: list[float]) -> float:
    """Exponent of the growth of time with size: slope of the logarithms, over the larger half of the sizes.

    At small sizes the overhead of calls hides the cost of the work.
    """
    start = min(len(sizes) // 2, len(sizes) - 2)
    return float(np.polyfit(np.log(sizes[start:]), np.log(times[start:]), 1)[0])


def scaling(
    setting: Setting,
    sides: tuple[int, ...] = (8, 16, 32, 64),
    batches: tuple[int, ...] = (1, 2, 4, 8, 16),
    repeats: int = 3,
    plot: Path | None = None,
) -> tuple[list[Row], dict]:
    """Rows of fitted exponents, and the measured times.

    Args:
        setting: model and device; its image size and batch are varied.
        sides: patches along a side, whose squares are the numbers of tokens; one image per step.
        batches: images per step, at 14 x 14 patches.
        repeats: measurements of each.
        plot: PNG file for a plot.
    """
    where = "GPU" if setting.device == "cuda" else "CPU"
    given = {**setting.__dict__, "patch_size": PATCH}
    tokens = [side * side for side in sides]
    by_tokens = [measure(Setting(**{**given, "img_size": PATCH * side, "batch": 1}), repeats) for side in sides]
    by_batch = [measure(Setting(**{**given, "img_size": PATCH * 14, "batch": size}), repeats) for size in batches]
    parts = {"step": None, "attention": None, "order": None, "rest": 1.1}
    names = {
        "step": "whole step",
        "attention": "attention alone",
        "order": "order and sorting",
        "rest": "step without attention",
    }
    rows = []
    for what, sizes, found in (("tokens", tokens, by_tokens), ("batch", list(batches), by_batch)):
        for part, bound in parts.items():
            target = bound if what == "tokens" else 1.1
            times = [one[part] for one in found]
            rows.append(
                Row(
                    f"{names[part]}: time grows with {what} to the power of", where, "", target, False, of_ours=True,
                    ours=exponent(sizes, times) if min(times) > 0 else None,
                    details={what: sizes, "milliseconds": [1e3 * t for t in times], "fitted": "larger half"},
                )
            )  # fmt: skip
    if plot:
        draw(plot, (("tokens", tokens, by_tokens), ("images a step", list(batches), by_batch)), names)
    return rows, {
        "tokens": dict(zip(tokens, by_tokens, strict=True)),
        "batch": dict(zip(batches, by_batch, strict=True)),
    }


def draw(path: Path, series: tuple, names: dict[str, str]) -> None:
    """Plot the times in two logarithmic panels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(series), figsize=(10, 4), layout="constrained")
    for axis, (what, sizes, found) in zip(axes, series, strict=True):
        for part, name in names.items():
            axis.loglog(sizes, [1e3 * one[part] or math.nan for one in found], marker="o", label=name)
        axis.loglog(sizes, [1e3 * found[-1]["rest"] * size / sizes[-1] for size in sizes], "k:", label="linear")
        axis.set(xlabel=what, ylabel="ms", xticks=sizes, xticklabels=sizes)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    try:
        with writing(path):
            figure.savefig(path, dpi=150)
    finally:
        plt.close(figure)


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Context manager: processes started in it have one thread each and see no GPU."""
    before = dict(os.environ)
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def processes(setting: Setting, count: int = 2, repeats: int = 5) -> list[Row]:
    """The step in `count` processes of one thread each that exchange gradients, against as many that do not.

    Both run alternately in the same processes, so both include the cost of sharing cores and memory. The time of one
    process alone is in the details.
    """
    if count > (os.cpu_count() or 1):
        return [
            Row(
                f"{count} processes, gradients exchanged by gloo: overhead of the step", "CPU", "", 0.1, False, True,
                details={"reason": f"{os.cpu_count()} core"},
            )
        ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for size in (1, count):
            out = Path(folder) / f"{size}.json"
            work = ["-m", "semaim.benchmarks.scaling", json.dumps(setting.__dict__), str(repeats), str(out)]
            with on_one_thread():
                failed = spawn(work, size)
            if failed or not out.is_file():
                raise UserError(f"the step in {size} processes failed: see above")
            found[size] = json.loads(out.read_text())
    together = found[count]
    overheads = [a / b - 1 for a, b in zip(together["exchanged"], together["alone"], strict=True)]
    alone = statistics.median(found[1]["alone"])
    a, b = (statistics.median(together[name]) for name in ("exchanged", "alone"))
    return [
        Row(
            f"{count} processes, gradients exchanged by gloo: overhead of the step", "CPU", "ms", 0.1, False,
            ours=a * 1e3, baseline=b * 1e3, ratio=statistics.median(overheads),
            spread=(min(overheads), max(overheads)),
            details={**setting.__dict__, "one_process_ms": alone * 1e3, "to_one_process": a / alone - 1},
        )
    ]  # fmt: skip


def work_in_step(setting: Setting, repeats: int, out: str) -> None:
    """The work of each process: the step without and, if there are several, with exchange of gradients, alternately."""
    from semaim.engine.runner import DistributedModel

    torch.set_num_threads(1)
    world = join()
    model, images, draw_numbers = setting.build()
    steps = {"alone": our_step(model, images, draw_numbers, setting.precision)}
    if world > 1:
        steps["exchanged"] = our_step(DistributedModel(model), images, draw_numbers, setting.precision)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            if world > 1:
                torch.distributed.barrier()
            found = seconds(step, torch.device("cpu"))
            if turn:
                times[name].append(found)
    if os.environ.get("RANK", "0") == "0":
        Path(out).write_text(json.dumps(times))
    if launched():
        leave()


if __name__ == "__main__":
    work_in_step(Setting(**json.loads(sys.argv[1])), int(sys.argv[2]), sys.argv[3])
