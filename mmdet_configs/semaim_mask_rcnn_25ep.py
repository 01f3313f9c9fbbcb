"""A quarter of the schedule: 25 epochs = 46,094 steps."""

_base_ = "semaim_mask_rcnn.py"

param_scheduler = dict(warmup=250 / 46094)
train_cfg = dict(max_iters=46094)
