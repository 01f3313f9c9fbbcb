"""ViT-L/16, the official protocol."""

_base_ = "../_base_/linear.py"

model = dict(network=dict(size="large"))
images_per_gpu = 256
