"""For the easy scenes: the encoder of semaim_vit_tiny_scenes_easy."""

_base_ = "vit_tiny_scenes.py"

model = dict(network=_base_._scenes_easy)
dataset = dict(root="data/scenes_easy/classes")
