"""For the built-in scenes, on a CPU: the encoder of semaim_vit_tiny_scenes, crops of 128 pixels, 21 classes."""

_base_ = ["_base_/upernet.py", "_base_/ade20k.py", "_base_/schedule_160k.py", "_base_/runtime.py"]

classes = (
    "airplane",
    "bag",
    "ball",
    "bird",
    "car",
    "cat",
    "clock",
    "dog",
    "fish",
    "flower",
    "fruit",
    "hat",
    "heart",
    "horse",
    "insect",
    "monkey",
    "shoe",
    "smiley",
    "train",
    "tree",
    "background",
)
palette = [[37 * i % 256, 91 * i % 256, 153 * i % 256] for i in range(1, 1 + len(classes))]
metainfo = dict(classes=classes, palette=palette)
size = (128, 128)
model = dict(
    data_preprocessor=dict(size=size),
    backbone=dict(size="tiny", depth=4, img_size=128, patch_size=8, drop_path_rate=0.0),
    neck=dict(embed_dim=192),
    decode_head=dict(in_channels=[192] * 4, channels=64, num_classes=len(classes)),
    auxiliary_head=dict(in_channels=192, channels=32, num_classes=len(classes)),
    test_cfg=dict(_delete_=True, mode="whole"),
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
train_dataset = dict(
    type="BaseSegDataset", data_root="data/scenes/ade", metainfo=metainfo, reduce_zero_label=True, pipeline=pipeline
)
val_dataset = dict(
    type="BaseSegDataset",
    data_root="data/scenes/ade",
    metainfo=metainfo,
    reduce_zero_label=True,
    pipeline=test_pipeline,
)
tta_ratios = (1.0, 1.25, 1.5)
total_batch_size = 8
images_per_gpu = 8
num_workers = 1
base_lr = 1e-3  # peak 5e-4 = 1e-3 x 8 / 16
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.8))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=50),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=50, end=1000),
]
train_cfg = dict(max_iters=1000, val_interval=500)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=100))
del classes, palette, metainfo, size, pipeline
