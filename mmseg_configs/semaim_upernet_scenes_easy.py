"""For the easy scenes, on a CPU: the encoder of semaim_vit_tiny_scenes_easy at 96 pixels, and a narrow head."""

_base_ = "semaim_upernet_scenes.py"

from semaim.data.pipelines import changed

_size = (96, 96)
_names = (*_base_._classes_easy, "background")
_data = dict(data_root="data/scenes_easy/ade", metainfo=dict(classes=_names, palette=_base_._palette[: len(_names)]))
model = dict(
    data_preprocessor=dict(size=_size),
    backbone=dict(embed_dim=128, num_heads=2, img_size=96),
    neck=dict(embed_dim=128, rescales=[2, 1, 0.5, 0.25]),
    decode_head=dict(in_channels=[128] * 4, channels=48, num_classes=len(_names)),
    auxiliary_head=dict(in_channels=128, num_classes=len(_names)),
)
train_dataset = dict(
    **_data,
    pipeline=changed(_base_.train_dataset.pipeline, RandomResize=dict(scale=_size), RandomCrop=dict(crop_size=_size)),
)
test_pipeline = changed(_base_.test_pipeline, Resize=dict(scale=_size))
val_dataset = dict(**_data, pipeline=test_pipeline)
base_lr = 8e-3  # peak 4e-3 = 8e-3 x 8 / 16, for the new layers; the blocks have 1/2 to 1/16 of it
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.5))
param_scheduler = dict(warmup=49 / 400)
train_cfg = dict(max_iters=400, val_interval=400)
