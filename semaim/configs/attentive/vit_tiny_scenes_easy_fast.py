"""The fast attentive probe for the easy scenes: the encoder of semaim_vit_tiny_scenes_easy."""

_base_ = "../knn/vit_tiny_scenes_easy.py"

task = "fast_attentive"
evaluation = dict(_delete_=True, type="FastAttentive", batch=64)
