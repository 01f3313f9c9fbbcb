"""semaim_upernet tested at six scales, each also flipped, the class probabilities averaged: as tools/test.py --tta.

The short side is 512 at least, as in the multi-scale test that gave MAE 48.7: ratios 0.5, 0.75 and 1 are one size.
"""

_base_ = "semaim_upernet.py"

tta = True
