"""For small studies on ADE20K-style data: the encoder of semaim_vit_tiny_cifar10, crops of 128 pixels."""

_base_ = ["_base_/upernet.py", "_base_/ade20k.py", "_base_/schedule_160k.py", "_base_/runtime.py"]

size = (128, 128)
model = dict(
    data_preprocessor=dict(size=size),
    backbone=dict(
        size="tiny",
        embed_dim=128,
        depth=4,
        num_heads=4,
        img_size=128,
        patch_size=4,
        drop_path_rate=0.0,
    ),
    neck=dict(embed_dim=128),
    decode_head=dict(in_channels=[128] * 4, channels=64),
    auxiliary_head=dict(in_channels=128, channels=32),
    test_cfg=dict(crop_size=size, stride=(85, 85)),
)
train_dataset = dict(
    pipeline=[
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations"),
        dict(type="RandomResize", scale=(512, 128), ratio_range=(0.5, 2.0), keep_ratio=True),
        dict(type="RandomCrop", crop_size=size, cat_max_ratio=0.75),
        dict(type="RandomFlip", prob=0.5),
        dict(type="PackSegInputs"),
    ]
)
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(512, 128), keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
val_dataset = dict(pipeline=test_pipeline)
total_batch_size = 16
images_per_gpu = 16
base_lr = 5e-4
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.8))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=250),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=250, end=5000),
]
train_cfg = dict(max_iters=5000, val_interval=5000)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=500))
del size
