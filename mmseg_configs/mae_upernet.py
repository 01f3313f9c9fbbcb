"""The baseline: ViT-B from MAE, all else equal. Give MAE's checkpoint by --pretrained. Published (mmseg): 48.1."""

_base_ = "semaim_upernet.py"
