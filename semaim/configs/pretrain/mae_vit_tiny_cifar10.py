"""The baseline of semaim_vit_tiny_cifar10: the same encoder and budget, a decoder of its size."""

_base_ = ["../_base_/mae.py", "../_base_/small.py"]

model = dict(network=dict(_base_._cifar10, decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=4))
dataset = dict(root="data/cifar10")
total_batch_size = 128
num_workers = 1
base_lr = 2e-3  # peak 1e-3 = 2e-3 x 128 / 256
param_scheduler = dict(warmup=0.1)
train_cfg = dict(max_epochs=3)
default_hooks = dict(checkpoint=dict(interval=1))
