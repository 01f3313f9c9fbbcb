"""For the easy scenes, on a CPU: the encoder of semaim_vit_tiny_scenes_easy at 96 pixels, and a narrow head."""

_base_ = "semaim_upernet_scenes.py"

classes = ("airplane", "ball", "car", "cat", "clock", "fish", "flower", "heart", "smiley", "tree", "background")
palette = [[37 * i % 256, 91 * i % 256, 153 * i % 256] for i in range(1, 1 + len(classes))]
metainfo = dict(classes=classes, palette=palette)
size = (96, 96)
model = dict(
    data_preprocessor=dict(size=size),
    backbone=dict(embed_dim=128, num_heads=2, img_size=96),
    neck=dict(embed_dim=128, rescales=[2, 1, 0.5, 0.25]),
    decode_head=dict(in_channels=[128] * 4, channels=48, num_classes=len(classes)),
    auxiliary_head=dict(in_channels=128, channels=32, num_classes=len(classes)),
)
pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=size, ratio_range=(0.7, 1.4), keep_ratio=True),
    dict(type="RandomCrop", crop_size=size, cat_max_ratio=0.9),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=size, keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
train_dataset = dict(data_root="data/scenes_easy/ade", metainfo=metainfo, pipeline=pipeline)
val_dataset = dict(data_root="data/scenes_easy/ade", metainfo=metainfo, pipeline=test_pipeline)
base_lr = 8e-3  # peak 4e-3 = 8e-3 x 8 / 16, for the new layers; the blocks have 1/2 to 1/16 of it
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.5))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=50),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=50, end=400),
]
train_cfg = dict(max_iters=400, val_interval=400)
del classes, palette, metainfo, size, pipeline
