"""The fast probe: features once, then many learning rates side by side. Not comparable with published probes."""

_base_ = "../_base_/features.py"

task = "fast_probe"
evaluation = dict(_delete_=True, type="FastProbe")
