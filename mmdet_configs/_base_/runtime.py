"""What every detector's run shares."""

_base_ = "../../semaim/configs/_base_/dense.py"

task = "detection"
default_scope = "mmdet"
default_hooks = dict(checkpoint=dict(interval=5000))
