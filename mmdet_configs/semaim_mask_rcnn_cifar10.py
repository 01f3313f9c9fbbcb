"""For small studies on COCO-style data: the encoder of semaim_vit_tiny_cifar10 at 256 pixels (64 x 64 patches)."""

_base_ = ["_base_/mask_rcnn.py", "_base_/coco.py", "_base_/vitdet_100ep.py", "_base_/runtime.py"]

image_size = (256, 256)
strides = [1, 2, 4, 8, 16]
model = dict(
    data_preprocessor=dict(side=256),
    backbone=dict(
        size="tiny",
        embed_dim=128,
        depth=4,
        num_heads=4,
        img_size=256,
        pretrain_img_size=32,
        patch_size=4,
        window_size=8,
        drop_path_rate=0.0,
    ),
    neck=dict(in_channels=128, out_channels=64, stride=4),
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(strides=strides)),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64, featmap_strides=strides[:4], finest_scale=28),
        bbox_head=dict(in_channels=64, conv_out_channels=64, fc_out_channels=256),
        mask_roi_extractor=dict(out_channels=64, featmap_strides=strides[:4], finest_scale=28),
        mask_head=dict(in_channels=64, conv_out_channels=64),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=500, max_per_img=200), rcnn=dict(sampler=dict(num=128))),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=200)),
)
train_dataset = dict(
    filter_cfg=dict(min_size=16),
    pipeline=[
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
        dict(type="RandomFlip", prob=0.5),
        dict(type="ResizeScale", scale=image_size, ratio_range=(0.7, 1.4)),
        dict(type="FixedSizeCrop", crop_size=image_size),
        dict(type="FilterAnnotations", min_gt_bbox_wh=(1e-2, 1e-2), by_mask=True, keep_empty=False),
        dict(type="PackDetInputs"),
    ],
)
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="ResizeShortestEdge", scale=image_size[0], max_size=image_size[0], resize_type="PillowResize"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
val_dataset = dict(pipeline=test_pipeline)
total_batch_size = 8
images_per_gpu = 8
base_lr = 4e-3  # peak 5e-4 = 4e-3 x 8 / 64
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type="MultiStepLR", by_epoch=False, begin=0, end=5000, milestones=[4250, 4750], gamma=0.1),
]
train_cfg = dict(max_iters=5000, val_interval=5000)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=500))
del image_size, strides
