"""For CIFAR-10 on a CPU: the encoder of semaim_vit_tiny_cifar10, five epochs."""

_base_ = ["../_base_/finetune.py", "../_base_/small.py"]

model = dict(
    network=dict(_base_._cifar10, drop_path_rate=0.0),
    mixup=0.0,
    cutmix=0.0,
)
dataset = dict(root="data/cifar10", augment="resized_crop", min_scale=0.35, crop_pct=1.0)
total_batch_size = 128
num_workers = 1
base_lr = 2e-3  # peak 1e-3 = 2e-3 x 128 / 256
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.8))
param_scheduler = dict(warmup=0.1)
train_cfg = dict(max_epochs=5)
