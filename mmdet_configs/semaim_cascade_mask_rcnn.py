"""Cascade R-CNN: three box heads at IoU 0.5, 0.6, 0.7, each with one box for all classes, and one mask head.

Published for MAE (ViTDet): 54.0 / 46.7.
"""

_base_ = "semaim_mask_rcnn.py"

model = dict(
    type="CascadeRCNN",
    roi_head=dict(
        type="ViTDetCascade",
        stages=[
            dict(iou=0.5, stds=[1 / 10, 1 / 10, 1 / 5, 1 / 5]),
            dict(iou=0.6, stds=[1 / 20, 1 / 20, 1 / 10, 1 / 10]),
            dict(iou=0.7, stds=[1 / 30, 1 / 30, 1 / 15, 1 / 15]),
        ],
    ),
)
