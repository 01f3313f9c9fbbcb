"""For the easy scenes: few labels, ten images of each class; the encoder of semaim_vit_tiny_scenes_easy."""

_base_ = "vit_tiny_scenes.py"

model = dict(network=_base_._scenes_easy)
dataset = dict(root="data/scenes_easy/classes", images_per_class=10)
total_batch_size = 50
base_lr = 1.024e-2  # peak 2e-3 = 1.024e-2 x 50 / 256
train_cfg = dict(max_epochs=80, val_interval=80)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=20))
