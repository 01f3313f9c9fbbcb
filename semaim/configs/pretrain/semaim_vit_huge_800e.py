"""ViT-H with patch 16, as in the official code. No published result."""

_base_ = "../_base_/pretrain.py"

model = dict(network=dict(size="huge"))
images_per_gpu = 64
