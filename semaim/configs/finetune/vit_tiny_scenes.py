"""For the built-in scenes on a CPU: the encoder of semaim_vit_tiny_scenes, ten epochs."""

_base_ = ["../_base_/finetune.py", "../_base_/small.py"]

model = dict(
    network=dict(_base_._scenes, drop_path_rate=0.0),
    mixup=0.0,
    cutmix=0.0,
)
dataset = dict(root="data/scenes/classes", augment="resized_crop", min_scale=0.35, crop_pct=1.0)
total_batch_size = 64
num_workers = 1
base_lr = 4e-3  # peak 1e-3 = 4e-3 x 64 / 256
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.8))
param_scheduler = dict(warmup=0.1)
train_cfg = dict(max_epochs=10)
default_hooks = dict(logger=dict(interval=5))
