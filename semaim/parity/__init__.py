"""Our models against recorded inputs and outputs of the reference implementations."""

from semaim.parity import mae, semaim, vitdet
from semaim.parity.cases import run_folder

#: family of cases -> its checks
FAMILIES = {"mae": mae.check, "semaim": semaim.check, "vitdet": vitdet.check}

__all__ = ["FAMILIES", "run_folder"]
