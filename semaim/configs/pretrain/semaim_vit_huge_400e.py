"""ViT-H, half as long. No result is published."""

_base_ = "semaim_vit_huge_800e.py"

param_scheduler = dict(warmup=30 / 400)
train_cfg = dict(max_epochs=400)
