"""L2-regularised logistic regression on few features, without anything to choose on further images.

Shapes: n images with labels, D channels, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from semaim.engine.watching import progress

STEPS = 300  #: of L-BFGS at most, as MSN's epochs
TOLERANCE = 1e-5  #: of the largest gradient


def unit(features: Tensor) -> Tensor:
    """Features (n, D), each less the mean of its channels and then of length 1, as MSN's evaluation has them."""
    features = features.float()
    return F.normalize(features - features.mean(dim=1, keepdim=True), dim=1)


def fit_logistic(features: Tensor, labels: Tensor, classes: int, penalty: float) -> Tensor:
    """Weights (D, C) that minimise the sum of the cross-entropies + penalty / 2 * their squared norm; no bias.

    Deterministic: L-BFGS from 0, with a line search, in fp32. features (n, D) as from `unit`, labels (n,).

    Source: MSN (Assran et al., ECCV 2022), `logistic_eval.py`: cyanure's multiclass-logistic with penalty l2 and
    lambda / n, without intercept. This is the same problem, multiplied by n.
    """
    weight = features.new_zeros(features.shape[1], classes, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight], max_iter=STEPS, tolerance_grad=TOLERANCE, tolerance_change=0.0, history_size=20,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        progress("a logistic regression")
        solver.zero_grad()
        loss = F.cross_entropy(features @ weight, labels, reduction="sum") + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return weight.detach()
