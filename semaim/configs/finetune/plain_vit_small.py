"""A first classifier on photographs of your own, with any encoder: all layers are trained for 30 epochs.

`--data-root DIR` is a folder of class folders: docs/own_data.md. Size, patches and statistics are the encoder's.
"""

_base_ = "plain_vit_100e.py"

model = dict(network=dict(patch_size=None, drop_path_rate=0.0), mixup=0.0, cutmix=0.0)
dataset = dict(augment="resized_crop", min_scale=0.35)
total_batch_size = 32
images_per_gpu = 32
num_workers = 2
base_lr = 4e-3  # peak 5e-4 = 4e-3 x 32 / 256
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.75))
param_scheduler = dict(warmup=0.1)
train_cfg = dict(max_epochs=30, val_interval=5)
default_hooks = dict(logger=dict(interval=10))
