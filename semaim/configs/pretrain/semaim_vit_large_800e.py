"""Published: 85.8 ImageNet top-1 after fine-tuning; the recipe of ViT-L is not, so it is ViT-B's."""

_base_ = "../_base_/pretrain.py"

model = dict(network=dict(size="large"))
images_per_gpu = 128
