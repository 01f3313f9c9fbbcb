"""Detectors for small data, on a CPU: ViTDet's with heads of 64 channels, and a jitter of 0.7 to 1.4."""

_base_ = ["../semaim_mask_rcnn.py", "../../semaim/configs/_base_/small.py"]

from semaim.data.pipelines import changed

model = dict(
    backbone=dict(drop_path_rate=0.0),
    neck=dict(out_channels=64),
    rpn_head=dict(in_channels=64, feat_channels=64),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64, finest_scale=28),
        bbox_head=dict(in_channels=64, conv_out_channels=64, fc_out_channels=256),
        mask_roi_extractor=dict(out_channels=64, finest_scale=28),
        mask_head=dict(in_channels=64, conv_out_channels=64),
    ),
)
train_dataset = dict(
    filter_cfg=dict(min_size=16),
    pipeline=changed(_base_.train_dataset.pipeline, ResizeScale=dict(ratio_range=(0.7, 1.4))),
)
total_batch_size = 8
images_per_gpu = 8
default_hooks = dict(logger=dict(interval=10))
