"""A check before a long run, on a CPU: can a small detector learn a few photographs with COCO's classes by heart?

`annotations/instances_overfit.json` lists them; they are trained on without augmentation, and measured. The encoder is
that of semaim_vit_tiny_scenes, at 256 pixels (32 x 32 patches).
"""

_base_ = ["semaim_mask_rcnn_scenes.py"]

image_size = (256, 256)
ann_file = "annotations/instances_overfit.json"
model = dict(
    data_preprocessor=dict(side=256),
    backbone=dict(img_size=256, window_size=8, global_blocks=(1, 3)),
    roi_head=dict(bbox_head=dict(num_classes=80), mask_head=dict(num_classes=80)),
    train_cfg=dict(rpn_proposal=dict(nms_pre=500, max_per_img=200), rcnn=dict(sampler=dict(num=128))),
    test_cfg=dict(rpn=dict(max_per_img=200)),
)
train_dataset = dict(
    data_root="data/coco",
    ann_file=ann_file,
    metainfo=dict(_delete_=True),
    pipeline=[
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
        dict(type="ResizeShortestEdge", scale=image_size[0], max_size=image_size[0], resize_type="PillowResize"),
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
val_dataset = dict(
    data_root="data/coco",
    ann_file=ann_file,
    data_prefix=dict(img="train2017/"),
    metainfo=dict(_delete_=True),
    pipeline=test_pipeline,
)
total_batch_size = 4
images_per_gpu = 4
base_lr = 8e-3  # peak 5e-4 = 8e-3 x 4 / 64
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=50),
    dict(type="MultiStepLR", by_epoch=False, begin=0, end=1000, milestones=[850, 950], gamma=0.1),
]
train_cfg = dict(max_iters=1000, val_interval=250)
del ann_file, image_size
