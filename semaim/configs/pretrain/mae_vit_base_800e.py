"""The baseline MAE, by its own recipe. Published after 1600 epochs: 83.6 ImageNet top-1 after fine-tuning."""

_base_ = "../_base_/mae.py"
