"""Checkpoints of plain ViTs in every dialect: read without running code, load with a report, convert, export."""

from semaim.checkpoints.exporting import DIALECTS, convert, export
from semaim.checkpoints.inspecting import inspect
from semaim.checkpoints.loading import LoadReport, fit, grouped, load
from semaim.checkpoints.reading import Checkpoint, classes_of, palette_of, read, recognise
from semaim.checkpoints.safe_reading import read_file
from semaim.checkpoints.same_network import kinds
from semaim.checkpoints.sizes import sizes_of

__all__ = [
    "DIALECTS",
    "Checkpoint",
    "LoadReport",
    "classes_of",
    "palette_of",
    "convert",
    "export",
    "fit",
    "grouped",
    "inspect",
    "kinds",
    "load",
    "read",
    "read_file",
    "recognise",
    "sizes_of",
]
