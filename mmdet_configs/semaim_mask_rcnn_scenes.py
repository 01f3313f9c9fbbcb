"""For the built-in scenes, on a CPU: the encoder of semaim_vit_tiny_scenes at 96 pixels (12 x 12 patches)."""

_base_ = ["_base_/mask_rcnn.py", "_base_/coco.py", "_base_/vitdet_100ep.py", "_base_/runtime.py"]

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
)
num_classes = len(classes)
image_size = (96, 96)
strides = [2, 4, 8, 16, 32]
model = dict(
    data_preprocessor=dict(side=96),
    backbone=dict(
        size="tiny", depth=4, img_size=96, pretrain_img_size=64, patch_size=8, window_size=6, drop_path_rate=0.0
    ),
    neck=dict(in_channels=192, out_channels=64, stride=8),
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(strides=strides)),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64, featmap_strides=strides[:4], finest_scale=28),
        bbox_head=dict(in_channels=64, conv_out_channels=64, fc_out_channels=256, num_classes=num_classes),
        mask_roi_extractor=dict(out_channels=64, featmap_strides=strides[:4], finest_scale=28),
        mask_head=dict(in_channels=64, conv_out_channels=64, num_classes=num_classes),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=200, max_per_img=100), rcnn=dict(sampler=dict(num=32))),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100)),
)
train_dataset = dict(
    data_root="data/scenes/coco",
    metainfo=dict(classes=classes),
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
val_dataset = dict(data_root="data/scenes/coco", metainfo=dict(classes=classes), pipeline=test_pipeline)
total_batch_size = 8
images_per_gpu = 8
num_workers = 1
base_lr = 8e-3  # peak 1e-3 = 8e-3 x 8 / 64
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=50),
    dict(type="MultiStepLR", by_epoch=False, begin=0, end=1000, milestones=[800, 925], gamma=0.1),
]
train_cfg = dict(max_iters=1000, val_interval=500)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=100))
del classes, num_classes, image_size, strides
