"""What every stage on images shares."""

_base_ = "common.py"

default_scope = "semaim"
compile = False
num_workers = 8
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=20))
log_processor = dict(window_size=20)
