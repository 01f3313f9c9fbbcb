"""Transformer blocks compiled by PyTorch, where it pays: fewer, fused operations between the matrix products."""

import importlib.util
import logging
import time
import warnings

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from torch import nn

from semaim.encoders.contract import Encoder
from semaim.errors import UserError
from semaim.models.vit import Block

#: Compiled blocks keep less than this share of what the compiler would keep by itself: all that follows from kept
#: values without a product or attention is computed again in the backward pass. 0.6 to 0.9 give the same. For ViT-B it
#: is 0.64 of the memory for 5 % more of the ideal time, by `semaim bench roofline`.
KEPT_SHARE = 0.7

#: Compilation takes about a minute, and a compiled step of 30 ms gains about a fifth: so many steps gain a minute.
MANY_STEPS = 10_000


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks inside a model: those of an encoder of any family, else our own."""
    encoders = [module for module in model.modules() if isinstance(module, Encoder)]
    found = [block for encoder in encoders for block in encoder.blocks]
    return found or [module for module in model.modules() if isinstance(module, Block)]


def compile_blocks(network: nn.Module, backend: str = "inductor") -> int:
    """Compile each transformer block of a network, in place, when it first runs; returns their number.

    Blocks share their code, so a pretraining compiles four functions: the order pass, and the blocks of both streams
    in training, each at one size. Under DDP and FSDP they are compiled as without.
    """
    import torch._functorch.config as partitioner

    partitioner.activation_memory_budget = KEPT_SHARE
    blocks = blocks_of(network)
    # Of one code torch keeps 8 variants; each drop path rate adds one for training, one for evaluation.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 4 * len(blocks))
    for block in blocks:
        block.compile(backend=backend)
    return len(blocks)


def obstacle(device: torch.device) -> str | None:
    """Why the compiler does not work here, in one line; None if it compiles and runs a small function."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    numbers = torch.linspace(0, 1, 64, device=device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.compile(_gelu)(numbers)
    except Exception as error:  # compilers, drivers and missing tools raise many types
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return lines[0][:200]
    return None if torch.allclose(found, _gelu(numbers), atol=1e-5) else "a compiled function gives other numbers"


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.gelu(x)


def compile_for(cfg: Config, model: nn.Module, steps: int, device: torch.device, log: logging.Logger) -> bool:
    """Compile a model's blocks if the config's `compile` says so; returns whether they are compiled.

    True compiles, and it is a `UserError` if that does not work here. "auto" compiles a training of many steps on a GPU
    without `fsdp`; where the compiler does not work, a warning says so.

    Args:
        steps: of the training; 0 for an evaluation, which "auto" does not compile.
    """
    wanted = cfg.get("compile", False)
    auto = wanted == "auto"
    if not wanted or auto and (device.type != "cuda" or steps < MANY_STEPS or cfg.get("fsdp")):
        return False
    if reason := obstacle(device):
        if not auto:
            raise UserError(
                f"compile=True: the compiler does not work here ({reason}): mend that, or set compile=False"
            )
        log.warning(f"blocks are not compiled: {reason}; training is slower")
        return False
    log.info(f"compiling {compile_blocks(model)} blocks when they first run: about a minute")
    return True


class CompileTime(Hook):
    """Logs how long the first step took, with compilation."""

    start: float | None = None

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Take the time."""
        if self.start is None:
            self.start, self.first = time.monotonic(), runner.iter

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Log it after the first step."""
        if self.start is not None and runner.iter == self.first:
            runner.logger.info(f"first step, with compilation: {time.monotonic() - self.start:.0f} s")
