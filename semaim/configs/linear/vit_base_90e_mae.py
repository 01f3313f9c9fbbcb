"""MAE's protocol: LARS, total batch 16384, resized crops, ten warm-up epochs. Published for MAE: 67.8 top-1."""

_base_ = "../_base_/linear.py"

dataset = dict(augment="resized_crop")
total_batch_size = 16384
base_lr = 0.1  # peak 6.4 = 0.1 x 16384 / 256
optim_wrapper = dict(optimizer=dict(type="LARS"))
param_scheduler = dict(warmup=10 / 90)
