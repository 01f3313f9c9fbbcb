"""ViT-L/16, class token."""

_base_ = "../_base_/features.py"

model = dict(network=dict(size="large"))
images_per_gpu = 128
