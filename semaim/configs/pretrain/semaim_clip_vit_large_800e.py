"""SemAIM* with ViT-L. Published: 86.5 ImageNet top-1 after fine-tuning."""

_base_ = "semaim_clip_vit_base_800e.py"

model = dict(network=dict(size="large"))
images_per_gpu = 128
