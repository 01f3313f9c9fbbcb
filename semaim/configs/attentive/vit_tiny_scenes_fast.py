"""The fast attentive probe for the built-in scenes: the encoder of semaim_vit_tiny_scenes."""

_base_ = "../knn/vit_tiny_scenes.py"

task = "fast_attentive"
evaluation = dict(_delete_=True, type="FastAttentive", batch=64)
