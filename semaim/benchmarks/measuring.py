"""Time, memory and equality, measured alike for all benchmarks."""

import concurrent.futures
import contextlib
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from semaim.errors import UserError


class Timing(NamedTuple):
    """Seconds of two alternately timed variants."""

    ours: float  #: median
    baseline: float  #: median
    ratio: float  #: median of baseline / ours over the turns: how many times faster ours is
    spread: tuple[float, float]  #: smallest and largest of those ratios


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device, inner: int = 1) -> float:
    """Time of one call, as the mean of `inner` calls."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(inner):
        work()
    synchronise(device)
    return (time.perf_counter() - start) / inner


def take_turns(
    works: Sequence[Callable[[], object]], device: torch.device, repeats: int = 5, warmup: int = 1, inner: int = 1
) -> list[tuple[float, ...]]:
    """Seconds of each variant, turn by turn; alternately, so that other load on the machine affects all of them.

    Args:
        works: functions; one call is one step.
        device: that they run on.
        repeats: turns that are measured; every second one is in reverse order.
        warmup: calls of each before the first turn.
        inner: calls per turn.
    """
    for _ in range(warmup):
        for work in works:
            work()
    turns = []
    for turn in range(repeats):
        direction = 1 if turn % 2 == 0 else -1
        turns.append(tuple([seconds(work, device, inner) for work in works[::direction]][::direction]))
    return turns


def ratio_of(ours: Sequence[float], baseline: Sequence[float]) -> Timing:
    """Medians and ratios of two variants' seconds in the same turns."""
    ratios = [b / a for a, b in zip(ours, baseline, strict=True)]
    a, b, ratio = (statistics.median(values) for values in (ours, baseline, ratios))
    return Timing(a, b, ratio, (min(ratios), max(ratios)))


def alternate(
    ours: Callable[[], object],
    baseline: Callable[[], object],
    device: torch.device,
    repeats: int = 5,
    warmup: int = 1,
    inner: int = 1,
) -> Timing:
    """`take_turns` of two variants."""
    columns = zip(*take_turns((ours, baseline), device, repeats, warmup, inner), strict=True)
    return ratio_of(*columns)


def relative_difference(ours: Iterable[Tensor], baseline: Iterable[Tensor]) -> float:
    """Largest difference of any pair, relative to its largest value or, if larger, 1/100 of that of all pairs.

    The latter applies to values that are zero up to rounding, such as the gradients of the keys' biases.
    """
    pairs = list(zip(ours, baseline, strict=True))
    scales = [max(a.abs().max().item(), b.abs().max().item()) for a, b in pairs]
    least = max(scales) / 100 or 1.0
    differences = [(a.double() - b.double()).abs().max().item() for a, b in pairs]
    return max(difference / max(scale, least) for difference, scale in zip(differences, scales, strict=True))


def check_equal(
    what: str, ours: Iterable[Tensor], baseline: Iterable[Tensor], tolerance: float, name: str = "the baseline"
) -> float:
    """The `relative_difference`; `UserError` above the tolerance, as only equal results are timed."""
    difference = relative_difference(ours, baseline)
    if not difference <= tolerance:
        raise UserError(
            f"{what} of ours and of {name} differ by {difference:.1e}, more than {tolerance:.0e}: not timed"
        )
    return difference


def gpu_peak(work: Callable[[], object], device: torch.device) -> float:
    """Peak of allocated GPU memory in bytes while `work` runs once, including everything else on the card."""
    torch.cuda.reset_peak_memory_stats(device)
    work()
    synchronise(device)
    return float(torch.cuda.max_memory_allocated(device))


def cpu_peak(build: Callable[..., Callable[[], object]], *arguments, steps: int = 2) -> float:
    """Memory of a step on a CPU in bytes, measured in a fresh process.

    The allocator keeps memory, so two variants cannot be measured in one process. The peak is the largest resident set
    of the process (the kernel's VmHWM, which unlike `ru_maxrss` does not include the parent's) minus its size before
    `build` was called: weights, gradients, optimizer state and activations, without Python and its libraries.

    Args:
        build: a function of a module that makes the step; called with `arguments` in the new process.
        steps: number of steps; in the second one gradients and optimizer state exist.
    """
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as process:
        return process.submit(_cpu_peak, torch.get_num_threads(), build, arguments, steps).result()


def _cpu_peak(threads: int, build: Callable, arguments: tuple, steps: int) -> float:
    torch.set_num_threads(threads)
    torch.nn.Linear(64, 64)(torch.ones(64, 64)).sum().backward()  # libraries are loaded on first use
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak of the imports
    before = process_memory("VmRSS")
    step = build(*arguments)
    for _ in range(steps):
        step()
    return process_memory("VmHWM") - before


def process_memory(name: str) -> float:
    """A figure of this process's memory in bytes, from Linux."""
    try:
        with open("/proc/self/status") as lines:
            return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
    except (OSError, StopIteration):
        raise UserError("memory on a CPU is read from /proc/self/status, which this system does not have") from None


def matmul_rate(device: torch.device, dtype: torch.dtype, side: int = 8192, repeats: int = 10) -> float:
    """Multiplications and additions per second of a product of two large square matrices: the practical limit."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = [seconds(lambda: a @ b, device, inner=5) for _ in range(repeats)]
    return 2 * side**3 / statistics.median(times)


def check_device(name: str) -> torch.device:
    """The device of a name; `UserError` if this machine does not have it."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no GPU that PyTorch sees; leave --device out for the CPU")
    return torch.device(name)
