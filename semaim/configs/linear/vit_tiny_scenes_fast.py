"""The fast probe for the built-in scenes: the encoder of semaim_vit_tiny_scenes."""

_base_ = "../knn/vit_tiny_scenes.py"

task = "fast_probe"
evaluation = dict(_delete_=True, type="FastProbe", batch=64)
