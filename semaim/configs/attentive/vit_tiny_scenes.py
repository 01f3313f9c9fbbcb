"""For the built-in scenes on a CPU: the encoder of semaim_vit_tiny_scenes."""

_base_ = ["vit_base_90e.py", "../_base_/small.py"]

model = dict(network=_base_._scenes)
dataset = dict(root="data/scenes/classes", min_scale=0.35, crop_pct=1.0)
total_batch_size = 64
num_workers = 1
base_lr = 6.4  # peak 1.6 = 6.4 x 64 / 256
param_scheduler = dict(warmup=1 / 10)
train_cfg = dict(max_epochs=10)
default_hooks = dict(logger=dict(interval=5))
