"""What every segmentor's run shares."""

_base_ = "../../semaim/configs/_base_/dense.py"

task = "segmentation"
default_scope = "mmseg"
default_hooks = dict(checkpoint=dict(interval=8000))
