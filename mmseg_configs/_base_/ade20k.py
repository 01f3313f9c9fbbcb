"""ADE20K: resized to 2048 x 512 by 0.5 to 2.0, crops of 512 pixels, at most 75 % of one class, flip, colour jitter."""

_crop_size = (512, 512)
train_dataset = dict(
    type="ADE20KDataset",
    data_root="data/ADEChallengeData2016",
    data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
    pipeline=[
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations"),
        dict(type="RandomResize", scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
        dict(type="RandomCrop", crop_size=_crop_size, cat_max_ratio=0.75),
        dict(type="RandomFlip", prob=0.5),
        dict(type="PhotoMetricDistortion"),
        dict(type="PackSegInputs"),
    ],
)
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2048, 512), keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
val_dataset = dict(
    type="ADE20KDataset",
    data_root="data/ADEChallengeData2016",
    data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
    test_mode=True,
    pipeline=test_pipeline,
)
tta_ratios = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
val_evaluator = dict(type="CountedIoUMetric", iou_metrics=["mIoU"])
