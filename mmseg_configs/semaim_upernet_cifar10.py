"""For small studies on ADE20K-style data: the encoder of semaim_vit_tiny_cifar10, crops of 128 pixels."""

_base_ = ["semaim_upernet.py", "../semaim/configs/_base_/small.py"]

from semaim.data.pipelines import changed

_size = (128, 128)
model = dict(
    data_preprocessor=dict(size=_size),
    backbone=dict(_base_._cifar10, img_size=128, drop_path_rate=0.0),
    neck=dict(embed_dim=128),
    decode_head=dict(in_channels=[128] * 4, channels=64),
    auxiliary_head=dict(in_channels=128, channels=32),
    test_cfg=dict(crop_size=_size, stride=(85, 85)),
)
train_dataset = dict(
    pipeline=changed(
        _base_.train_dataset.pipeline,
        RandomResize=dict(scale=(512, 128)),
        RandomCrop=dict(crop_size=_size),
        PhotoMetricDistortion=None,
    ),
)
test_pipeline = changed(_base_.test_pipeline, Resize=dict(scale=(512, 128)))
val_dataset = dict(pipeline=test_pipeline)
total_batch_size = 16
images_per_gpu = 16
base_lr = 5e-4
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.8))
param_scheduler = dict(start_factor=1e-3, warmup=249 / 5000)
train_cfg = dict(max_iters=5000, val_interval=5000)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=500))
