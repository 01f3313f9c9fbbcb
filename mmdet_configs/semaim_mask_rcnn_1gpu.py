"""One card: batch 8, learning rate 1.25e-5 = 1e-4 x 8 / 64, activations computed again; 25 epochs = 368,750 steps."""

_base_ = "semaim_mask_rcnn.py"

model = dict(backbone=dict(with_cp=True))
total_batch_size = 8
images_per_gpu = 2
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=2001),
    dict(type="MultiStepLR", by_epoch=False, begin=0, end=368750, milestones=[327778, 355092], gamma=0.1),
]
train_cfg = dict(max_iters=368750, val_interval=20000)
