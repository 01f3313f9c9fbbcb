"""Checkpoints of plain ViTs in every dialect: read without running code, load with a report, convert, export."""

from semaim.checkpoints.checkpoint import (
    DIALECTS,
    Checkpoint,
    LoadReport,
    classes_of,
    convert,
    export,
    fit,
    grouped,
    inspect,
    kinds,
    load,
    read,
    recognise,
    sizes_of,
)
from semaim.checkpoints.safe_reading import read_file

__all__ = [
    "DIALECTS",
    "Checkpoint",
    "LoadReport",
    "classes_of",
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
