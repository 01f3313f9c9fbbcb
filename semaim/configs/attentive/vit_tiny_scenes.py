"""For the built-in scenes on a CPU: the encoder of semaim_vit_tiny_scenes."""

_base_ = "../linear/vit_tiny_scenes.py"

task = "attentive"
model = dict(network=dict(pool="ep"))
optim_wrapper = dict(optimizer=dict(type="LARS"))
base_lr = 6.4  # peak 1.6 = 6.4 x 64 / 256, as published
