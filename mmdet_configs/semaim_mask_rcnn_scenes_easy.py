"""For the easy scenes, on a CPU: the encoder of semaim_vit_tiny_scenes_easy at 96 pixels, and light heads."""

_base_ = "semaim_mask_rcnn_scenes.py"

_strides = [4, 8, 16, 32]
_num_classes = len(_base_._classes_easy)
model = dict(
    backbone=dict(embed_dim=128, num_heads=2),
    neck=dict(in_channels=128, scales=(2, 1, 0.5)),
    rpn_head=dict(num_convs=1, anchor_generator=dict(scales=[5], strides=_strides)),
    roi_head=dict(
        bbox_roi_extractor=dict(featmap_strides=_strides[:3]),
        bbox_head=dict(num_classes=_num_classes),
        mask_roi_extractor=dict(featmap_strides=_strides[:3]),
        mask_head=dict(num_convs=2, num_classes=_num_classes),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=100, max_per_img=50)),
    test_cfg=dict(rpn=dict(nms_pre=100, max_per_img=50), rcnn=dict(max_per_img=20)),
)
_data = dict(data_root="data/scenes_easy/coco", metainfo=dict(classes=_base_._classes_easy))
train_dataset = _data
val_dataset = _data
total_batch_size = 4
images_per_gpu = 4
base_lr = 8e-3  # peak 5e-4 = 8e-3 x 4 / 64
param_scheduler = dict(warmup=49 / 900, milestones=(720 / 900, 840 / 900))
train_cfg = dict(max_iters=900, val_interval=900)
default_hooks = dict(logger=dict(interval=20))
