"""COCO instances by ViTDet's recipe: flip first, large-scale jitter 0.1 to 2.0 into 1024 pixels, by Pillow.

Masks are bitmaps, in detectron2 polygons, and boxes are those of the cropped masks; an image whose objects are all cut
off is trained on as it is.
"""

_side = 1024
train_dataset = dict(
    type="CocoDataset",
    data_root="data/coco",
    ann_file="annotations/instances_train2017.json",
    data_prefix=dict(img="train2017/"),
    filter_cfg=dict(filter_empty_gt=True),
    pipeline=[
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
        dict(type="RandomFlip", prob=0.5),
        dict(type="ResizeScale", scale=(_side, _side), ratio_range=(0.1, 2.0)),
        dict(type="FixedSizeCrop", crop_size=(_side, _side)),
        dict(type="FilterAnnotations", min_gt_bbox_wh=(1e-2, 1e-2), by_mask=True, keep_empty=False),
        dict(type="PackDetInputs"),
    ],
)
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="ResizeShortestEdge", scale=_side, max_size=_side, resize_type="PillowResize"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
val_dataset = dict(
    type="CocoDataset",
    data_root="data/coco",
    ann_file="annotations/instances_val2017.json",
    data_prefix=dict(img="val2017/"),
    test_mode=True,
    pipeline=test_pipeline,
)
val_evaluator = dict(type="CocoMetric", metric=["bbox", "segm"], classwise=True)
