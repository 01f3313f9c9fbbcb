"""For the built-in scenes on a CPU: the encoder of semaim_vit_tiny_scenes."""

_base_ = ["../_base_/linear.py", "../_base_/small.py"]

model = dict(network=_base_._scenes)
dataset = dict(root="data/scenes/classes", augment="resized_crop", min_scale=0.35, crop_pct=1.0)
total_batch_size = 64
num_workers = 1
base_lr = 0.4  # peak 0.1 = 0.4 x 64 / 256
train_cfg = dict(max_epochs=10)
default_hooks = dict(logger=dict(interval=5))
