"""The paper's main setting: ViT-B/16, pixels, 800 epochs. Published: 84.1 ImageNet top-1 after fine-tuning."""

_base_ = "../_base_/pretrain.py"
