"""The baseline of row-by-row order (as in iGPT), all else as SemAIM."""

_base_ = "../_base_/pretrain.py"

model = dict(network=dict(order="raster"))
