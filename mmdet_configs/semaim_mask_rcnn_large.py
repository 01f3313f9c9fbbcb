"""ViT-L: drop path 0.4, layer decay 0.8, global blocks 5, 11, 17, 23. Published for MAE (ViTDet): 55.5 / 49.2."""

_base_ = "semaim_mask_rcnn.py"

model = dict(backbone=dict(size="large", drop_path_rate=0.4), neck=dict(in_channels=1024))
images_per_gpu = 2
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.8))
