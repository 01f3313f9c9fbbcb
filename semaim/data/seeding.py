"""Random numbers of a sample that depend on nothing but whole numbers."""

import random

import numpy as np
import torch

from semaim.data.folder import seed_of


class seeded:  # noqa: N801  # used as a function: `with seeded(1, 2):`
    """Context manager that seeds the generators of torch (CPU), numpy and Python, and restores their states at its end.

    timm's augmentations draw from all three.

    Args:
        *parts: whole numbers of 0 or more, the seed together.
    """

    def __init__(self, *parts: int):
        self.seed = seed_of(*parts)

    def __enter__(self) -> None:
        self.states = torch.get_rng_state(), np.random.get_state(), random.getstate()
        torch.default_generator.manual_seed(self.seed)
        np.random.seed(self.seed % 2**32)
        random.seed(self.seed)

    def __exit__(self, *error) -> None:
        torch.set_rng_state(self.states[0])
        np.random.set_state(self.states[1])
        random.setstate(self.states[2])
