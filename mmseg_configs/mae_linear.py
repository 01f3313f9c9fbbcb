"""The baseline: ViT-B from MAE, all else equal. Give MAE's checkpoint by --pretrained."""

_base_ = "semaim_linear.py"
