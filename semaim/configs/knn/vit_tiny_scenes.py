"""For the built-in scenes: the encoder of semaim_vit_tiny_scenes."""

_base_ = "../_base_/features.py"

model = dict(network=dict(size="tiny", depth=4, img_size=64, patch_size=8))
dataset = dict(root="data/scenes/classes", crop_pct=1.0)
num_workers = 1
images_per_gpu = 64
