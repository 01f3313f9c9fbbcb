"""Encoders of every family behind one contract, and their sources: names of timm and of the hub, folders, files."""

from semaim.encoders.contract import FAMILIES, POOLS, Encoder, Source, build
from semaim.encoders.sources import open_source

__all__ = ["FAMILIES", "POOLS", "Encoder", "Source", "build", "open_source"]
