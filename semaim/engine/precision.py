"""What a network computes in: bf16 by autocast, or fp32. A setting for GPUs and one for CPUs."""

import torch

from semaim.errors import UserError

PRECISIONS = ("bf16", "fp32")


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bf16 itself: AVX-512 BF16, which processors with AMX have too.

    Elsewhere products of bf16 are no faster than of fp32. PyTorch tells it of x86 alone, and only by a private name.
    """
    return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()


def check_precision(node: str, precision: str, cpu_precision: str) -> None:
    """`UserError` for an unknown value, or for bf16 where the run would be on a CPU that has no instructions for it.

    Args:
        node: path of the config's dict that has these keys.
        precision: on a GPU.
        cpu_precision: on a CPU.
    """
    for key, value in (("precision", precision), ("cpu_precision", cpu_precision)):
        if value not in PRECISIONS:
            raise UserError(f"{node}.{key} {value!r} is unknown: choose bf16 or fp32")
    if cpu_precision == "bf16" and not torch.cuda.is_available() and not cpu_has_bf16():
        raise UserError(
            f"{node}.cpu_precision is bf16, and this processor has no instructions for it (AVX-512 BF16): run on one"
            f" that has, or set --cfg-options {node}.cpu_precision=fp32 (with --resume also --override)"
        )


def computed_in(device: torch.device | str, precision: str, cpu_precision: str) -> str:
    """The one of the two that holds on a device."""
    return precision if torch.device(device).type == "cuda" else cpu_precision


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    """The context of a forward pass in this precision: autocast for bf16, without scaling the loss."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")
