"""For the easy scenes, on a CPU: the encoder of semaim_vit_tiny_scenes_easy at 96 pixels, and light heads."""

_base_ = "semaim_mask_rcnn_scenes.py"

classes = ("airplane", "ball", "car", "cat", "clock", "fish", "flower", "heart", "smiley", "tree")
strides = [4, 8, 16, 32]
model = dict(
    backbone=dict(embed_dim=128, num_heads=2),
    neck=dict(in_channels=128, out_channels=64, scales=(2, 1, 0.5)),
    rpn_head=dict(num_convs=1, anchor_generator=dict(scales=[5], strides=strides)),
    roi_head=dict(
        bbox_roi_extractor=dict(featmap_strides=strides[:3], finest_scale=28),
        bbox_head=dict(fc_out_channels=256, num_classes=len(classes)),
        mask_roi_extractor=dict(featmap_strides=strides[:3], finest_scale=28),
        mask_head=dict(num_convs=2, num_classes=len(classes)),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=100, max_per_img=50), rcnn=dict(sampler=dict(num=32))),
    test_cfg=dict(rpn=dict(nms_pre=100, max_per_img=50), rcnn=dict(max_per_img=20)),
)
train_dataset = dict(data_root="data/scenes_easy/coco", metainfo=dict(classes=classes))
val_dataset = dict(data_root="data/scenes_easy/coco", metainfo=dict(classes=classes))
total_batch_size = 4
images_per_gpu = 4
base_lr = 8e-3  # peak 5e-4 = 8e-3 x 4 / 64
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=50),
    dict(type="MultiStepLR", by_epoch=False, begin=0, end=900, milestones=[720, 840], gamma=0.1),
]
train_cfg = dict(max_iters=900, val_interval=900)
default_hooks = dict(logger=dict(interval=20))
del classes, strides
