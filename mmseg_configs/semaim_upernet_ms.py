"""semaim_upernet tested at six scales, each also flipped, the class probabilities averaged: as tools/test.py --tta."""

_base_ = "semaim_upernet.py"

tta = True
