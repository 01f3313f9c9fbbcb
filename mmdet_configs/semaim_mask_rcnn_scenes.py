"""For the built-in scenes, on a CPU: the encoder of semaim_vit_tiny_scenes at 96 pixels (12 x 12 patches)."""

_base_ = "_base_/small.py"

from semaim.data.pipelines import changed

_side = 96
_strides = [2, 4, 8, 16, 32]
model = dict(
    data_preprocessor=dict(side=_side),
    backbone=dict(_base_._scenes, img_size=_side, pretrain_img_size=64, window_size=6),
    neck=dict(in_channels=192, stride=8),
    rpn_head=dict(anchor_generator=dict(strides=_strides)),
    roi_head=dict(
        bbox_roi_extractor=dict(featmap_strides=_strides[:4]),
        bbox_head=dict(num_classes=len(_base_._classes)),
        mask_roi_extractor=dict(featmap_strides=_strides[:4]),
        mask_head=dict(num_classes=len(_base_._classes)),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=200, max_per_img=100), rcnn=dict(sampler=dict(num=32))),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100)),
)
_data = dict(data_root="data/scenes/coco", metainfo=dict(classes=_base_._classes))
train_dataset = dict(
    **_data,
    pipeline=changed(
        _base_.train_dataset.pipeline,
        ResizeScale=dict(scale=(_side, _side)),
        FixedSizeCrop=dict(crop_size=(_side, _side)),
    ),
)
test_pipeline = changed(_base_.test_pipeline, ResizeShortestEdge=dict(scale=_side, max_size=_side))
val_dataset = dict(**_data, pipeline=test_pipeline)
num_workers = 1
base_lr = 8e-3  # peak 1e-3 = 8e-3 x 8 / 64
param_scheduler = dict(warmup=0.049, milestones=(0.8, 0.925))
train_cfg = dict(max_iters=1000, val_interval=500)
default_hooks = dict(checkpoint=dict(interval=100))
