"""For the built-in scenes, on a CPU: the encoder of semaim_vit_tiny_scenes, crops of 128 pixels, 21 classes."""

_base_ = ["semaim_upernet.py", "../semaim/configs/_base_/small.py"]

from semaim.data.pipelines import changed

_size = (128, 128)
_names = (*_base_._classes, "background")
_data = dict(
    type="BaseSegDataset",
    data_root="data/scenes/ade",
    metainfo=dict(classes=_names, palette=_base_._palette),
    reduce_zero_label=True,
)
model = dict(
    data_preprocessor=dict(size=_size),
    backbone=dict(_base_._scenes, img_size=128, drop_path_rate=0.0),
    neck=dict(embed_dim=192),
    decode_head=dict(in_channels=[192] * 4, channels=64, num_classes=len(_names)),
    auxiliary_head=dict(in_channels=192, channels=32, num_classes=len(_names)),
    test_cfg=dict(_delete_=True, mode="whole"),
)
train_dataset = dict(
    **_data,
    pipeline=changed(
        _base_.train_dataset.pipeline,
        RandomResize=dict(scale=_size, ratio_range=(0.7, 1.4)),
        RandomCrop=dict(crop_size=_size, cat_max_ratio=0.9),
        PhotoMetricDistortion=None,
    ),
)
test_pipeline = changed(_base_.test_pipeline, Resize=dict(scale=_size))
val_dataset = dict(**_data, pipeline=test_pipeline)
tta_ratios = (1.0, 1.25, 1.5)
total_batch_size = 8
images_per_gpu = 8
num_workers = 1
base_lr = 1e-3  # peak 5e-4 = 1e-3 x 8 / 16
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.8))
param_scheduler = dict(start_factor=1e-3, warmup=0.049)
train_cfg = dict(max_iters=1000, val_interval=500)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=100))
