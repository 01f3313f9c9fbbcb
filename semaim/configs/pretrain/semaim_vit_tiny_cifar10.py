"""For CIFAR-10 (32 px images, patches of 4 px: 8 x 8) on a CPU: four blocks of width 128, three epochs."""

_base_ = ["../_base_/pretrain.py", "../_base_/small.py"]

model = dict(network=dict(_base_._cifar10, target=dict(blur_kernel=0)))
dataset = dict(root="data/cifar10")
total_batch_size = 128
num_workers = 1
base_lr = 2e-3  # peak 1e-3 = 2e-3 x 128 / 256
param_scheduler = dict(warmup=0.1)
train_cfg = dict(max_epochs=3)
default_hooks = dict(checkpoint=dict(interval=1), pictures=dict(interval=3))
