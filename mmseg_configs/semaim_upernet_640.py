"""Crops of 640 pixels, slide inference by 426, as BEiT's configs of that size; no figure is published for SemAIM."""

_base_ = "semaim_upernet.py"

from semaim.data.pipelines import changed

_crop_size = (640, 640)
_scale = (2560, 640)
model = dict(
    data_preprocessor=dict(size=_crop_size),
    backbone=dict(img_size=640),
    test_cfg=dict(crop_size=_crop_size, stride=(426, 426)),
)
train_dataset = dict(
    pipeline=changed(
        _base_.train_dataset.pipeline, RandomResize=dict(scale=_scale), RandomCrop=dict(crop_size=_crop_size)
    ),
)
test_pipeline = changed(_base_.test_pipeline, Resize=dict(scale=_scale))
val_dataset = dict(pipeline=test_pipeline)
