"""For the built-in scenes: a slim ViT at 64 px with 8 px patches, which two CPU cores train in minutes."""

_base_ = ["../_base_/pretrain.py", "../_base_/small.py"]

model = dict(network=dict(_base_._scenes, target=dict(blur_kernel=0)))
dataset = dict(root="data/scenes/classes")
total_batch_size = 64
num_workers = 1
base_lr = 4e-3  # peak 1e-3 = 4e-3 x 64 / 256
param_scheduler = dict(warmup=2 / 30)
train_cfg = dict(max_epochs=30)
default_hooks = dict(logger=dict(interval=5), checkpoint=dict(interval=5), pictures=dict(interval=10))
