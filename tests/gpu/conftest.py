"""Each test here runs on a CPU and, marked `gpu`, on a GPU: so the tests for GPUs do not rot where there is none."""

import pytest
import torch

WITHOUT = "no GPU: runs where torch sees one"


@pytest.fixture(
    scope="session",
    params=[
        "cpu",
        pytest.param(
            "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=WITHOUT)]
        ),
    ],
)
def device(request):
    """The type of the device."""
    return request.param


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """No TF32 in convolutions, which torch allows there by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
