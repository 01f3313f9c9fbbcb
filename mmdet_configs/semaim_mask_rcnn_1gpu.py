"""One card: batch 8, learning rate 1.25e-5 = 1e-4 x 8 / 64, activations computed again; 25 epochs = 368,750 steps."""

_base_ = "semaim_mask_rcnn.py"

model = dict(backbone=dict(with_cp=True))
total_batch_size = 8
images_per_gpu = 2
param_scheduler = dict(warmup=2000 / 368750)
train_cfg = dict(max_iters=368750, val_interval=20000)
