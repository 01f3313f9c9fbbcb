"""For the easy scenes: the encoder of semaim_vit_tiny_scenes_easy."""

_base_ = "vit_tiny_scenes.py"

model = dict(network=dict(embed_dim=128, num_heads=2))
dataset = dict(root="data/scenes_easy/classes")
