"""A check before a long run, on a CPU: can a small detector learn a few photographs with COCO's classes by heart?

`annotations/instances_overfit.json` lists them; they are trained on without augmentation, and measured. The encoder is
that of semaim_vit_tiny_scenes, at 256 pixels (32 x 32 patches).
"""

_base_ = "semaim_mask_rcnn_scenes.py"

from semaim.data.pipelines import changed

_side = 256
model = dict(
    data_preprocessor=dict(side=_side),
    backbone=dict(img_size=_side, window_size=8, global_blocks=(1, 3)),
    roi_head=dict(bbox_head=dict(num_classes=80), mask_head=dict(num_classes=80)),
    train_cfg=dict(rpn_proposal=dict(nms_pre=500, max_per_img=200), rcnn=dict(sampler=dict(num=128))),
    test_cfg=dict(rpn=dict(max_per_img=200)),
)
_data = dict(
    data_root="data/coco",
    ann_file="annotations/instances_overfit.json",
    data_prefix=dict(img="train2017/"),
    metainfo=dict(_delete_=True),
)
_resize = dict(type="ResizeShortestEdge", scale=_side, max_size=_side, resize_type="PillowResize")
_load, _annotations, *_, _filter, _pack = _base_.train_dataset.pipeline
train_dataset = dict(**_data, pipeline=[_load, _annotations, _resize, _filter, _pack])
test_pipeline = changed(_base_.test_pipeline, ResizeShortestEdge=_resize)
val_dataset = dict(**_data, pipeline=test_pipeline)
total_batch_size = 4
images_per_gpu = 4
base_lr = 8e-3  # peak 5e-4 = 8e-3 x 4 / 64
param_scheduler = dict(milestones=(0.85, 0.95))
train_cfg = dict(val_interval=250)
