"""A quarter of the schedule: 25 epochs = 46,094 steps."""

_base_ = "semaim_mask_rcnn.py"

param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=251),  # 250 steps up: both ends count
    dict(type="MultiStepLR", by_epoch=False, begin=0, end=46094, milestones=[40972, 44387], gamma=0.1),
]
train_cfg = dict(max_iters=46094)
