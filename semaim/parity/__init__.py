"""Our models against recorded inputs and outputs of the reference implementations."""

from semaim.parity.cases import run_folder
from semaim.parity.semaim import check

#: family of cases -> its checks
FAMILIES = {"semaim": check}

__all__ = ["FAMILIES", "run_folder"]
