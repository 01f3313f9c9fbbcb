"""ViT-L/16, the published protocol. Published for MAE: 79.5 top-1."""

_base_ = "vit_base_90e.py"

model = dict(network=dict(size="large"))
images_per_gpu = 256
