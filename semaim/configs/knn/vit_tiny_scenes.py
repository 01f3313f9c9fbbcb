"""For the built-in scenes: the encoder of semaim_vit_tiny_scenes."""

_base_ = ["../_base_/features.py", "../_base_/small.py"]

model = dict(network=_base_._scenes)
dataset = dict(root="data/scenes/classes", crop_pct=1.0)
num_workers = 1
images_per_gpu = 64
evaluations = dict(  # for --tasks
    fast_probe=dict(type="FastProbe", batch=64), fast_attentive=dict(type="FastAttentive", batch=64)
)
