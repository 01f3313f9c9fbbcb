"""Published: 85.5 ImageNet top-1 after fine-tuning."""

_base_ = "semaim_vit_large_800e.py"

param_scheduler = dict(warmup=30 / 400)
train_cfg = dict(max_epochs=400)
