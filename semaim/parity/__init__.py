"""Comparison of our models with recorded inputs and outputs of the reference implementations."""

from semaim.parity import detector, mae, mmseg, semaim, vitdet
from semaim.parity.cases import run_folder

#: family of cases -> its checks
FAMILIES = {
    "detector": detector.check,
    "mae": mae.check,
    "mmseg": mmseg.check,
    "semaim": semaim.check,
    "vitdet": vitdet.check,
}

__all__ = ["FAMILIES", "run_folder"]
