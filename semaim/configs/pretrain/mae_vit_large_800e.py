"""MAE with ViT-L."""

_base_ = "../_base_/mae.py"

model = dict(network=dict(size="large"))
