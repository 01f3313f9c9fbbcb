"""SimMIM beside semaim_vit_tiny_scenes_easy: the same encoder and budget."""

_base_ = ["../_base_/simmim.py", "../_base_/small.py"]

model = dict(network=dict(_base_._scenes_easy, mask_size=16, drop_path_rate=0.0))
dataset = dict(root="data/scenes_easy/unlabelled")
total_batch_size = 32
num_workers = 1
base_lr = 1.6e-2  # peak 2e-3 = 1.6e-2 x 32 / 256
param_scheduler = dict(warmup=0.1)
train_cfg = dict(max_epochs=6)
default_hooks = dict(checkpoint=dict(interval=1), pictures=dict(interval=3))
