"""Fixtures of all tests."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# The same examples in every run, and none fails for being slow on a busy machine.
settings.register_profile("semaim", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("semaim")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the recorded results of the reference implementations."""
    path = ROOT / os.environ.get("SEMAIM_SHARED", "../shared")
    if not (path / "golden").is_dir():
        pytest.skip(f"no recorded results at {path}: set SEMAIM_SHARED to the folder that holds golden/")
    return path
