"""Published: 83.8 ImageNet top-1 after fine-tuning."""

_base_ = "semaim_vit_base_800e.py"

train_cfg = dict(max_epochs=400)
