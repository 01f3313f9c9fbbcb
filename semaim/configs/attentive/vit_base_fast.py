"""The fast attentive probe: tokens once, then several learning rates. Not comparable with published probes."""

_base_ = "../_base_/features.py"

task = "fast_attentive"
evaluation = dict(_delete_=True, type="FastAttentive")
