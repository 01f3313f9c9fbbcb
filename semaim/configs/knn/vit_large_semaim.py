"""ViT-L/16, mean of the patches through a fresh LayerNorm: the official SemAIM's command."""

_base_ = "vit_base_semaim.py"

model = dict(network=dict(size="large"))
images_per_gpu = 128
