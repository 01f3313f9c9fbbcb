"""For small studies on COCO-style data: the encoder of semaim_vit_tiny_cifar10 at 256 pixels (64 x 64 patches)."""

_base_ = "_base_/small.py"

from semaim.data.pipelines import changed

_side = 256
_strides = [1, 2, 4, 8, 16]
model = dict(
    data_preprocessor=dict(side=_side),
    backbone=dict(_base_._cifar10, img_size=_side, pretrain_img_size=32, window_size=8),
    neck=dict(in_channels=128, stride=4),
    rpn_head=dict(anchor_generator=dict(strides=_strides)),
    roi_head=dict(
        bbox_roi_extractor=dict(featmap_strides=_strides[:4]), mask_roi_extractor=dict(featmap_strides=_strides[:4])
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=500, max_per_img=200), rcnn=dict(sampler=dict(num=128))),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=200)),
)
train_dataset = dict(
    pipeline=changed(
        _base_.train_dataset.pipeline,
        ResizeScale=dict(scale=(_side, _side)),
        FixedSizeCrop=dict(crop_size=(_side, _side)),
    )
)
test_pipeline = changed(_base_.test_pipeline, ResizeShortestEdge=dict(scale=_side, max_size=_side))
val_dataset = dict(pipeline=test_pipeline)
base_lr = 4e-3  # peak 5e-4 = 4e-3 x 8 / 64
param_scheduler = dict(warmup=249 / 5000, milestones=(0.85, 0.95))
train_cfg = dict(max_iters=5000)
default_hooks = dict(checkpoint=dict(interval=500))
