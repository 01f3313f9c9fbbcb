"""ViT-L/16, class token after the encoder's norm, k and temperature as DINO's eval_knn.py."""

_base_ = "../_base_/features.py"

model = dict(network=dict(size="large"))
images_per_gpu = 128
