"""Imports point down, by the layers that docs/architecture.md lists, and its drawing is that of the code."""

import layers
from commands import ROOT


def test_no_import_points_upwards():
    height = {part: number for number, layer in enumerate(layers.layers()) for part in layer}
    parts = {path.name.removesuffix(".py") for path in (ROOT / "semaim").iterdir() if path.suffix in ("", ".py")}
    unlisted = parts - set(height) - {"__init__", "__pycache__", "configs"}
    assert not unlisted, f"docs/architecture.md lists no layer of {unlisted}"
    wrong = [(file, other) for file, own, other in layers.imports() if height[other] > height[own]]
    assert not wrong, wrong


def test_no_folders_import_each_other():
    edges = {(own, other) for _, own, other in layers.imports()}
    reached = set(edges)
    while more := {(a, d) for a, b in reached for c, d in edges if b == c} - reached:
        reached |= more
    assert not [pair for pair in reached if pair[0] == pair[1]]


def test_the_drawing_is_made_from_the_code():
    assert layers.drawing() in layers.DOCUMENT.read_text(encoding="utf-8"), "run: python tests/layers.py"
