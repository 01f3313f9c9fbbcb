"""The baseline of semaim_vit_tiny_scenes: the same encoder and budget, a decoder of its size."""

_base_ = ["../_base_/mae.py", "../_base_/small.py"]

model = dict(network=dict(_base_._scenes, decoder_embed_dim=96, decoder_depth=2, decoder_num_heads=3))
dataset = dict(root="data/scenes/classes")
total_batch_size = 64
num_workers = 1
base_lr = 4e-3  # peak 1e-3 = 4e-3 x 64 / 256
param_scheduler = dict(warmup=2 / 30)
train_cfg = dict(max_epochs=30)
default_hooks = dict(logger=dict(interval=5), checkpoint=dict(interval=5))
