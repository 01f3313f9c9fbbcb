"""What every detector's and segmentor's run shares: it counts in iterations."""

_base_ = "common.py"

compile = False
num_workers = 4
default_hooks = dict(logger=dict(interval=50), checkpoint=dict(by_epoch=False))
log_processor = dict(window_size=50, by_epoch=False)
