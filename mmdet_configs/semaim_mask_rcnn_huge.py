"""ViT-H with patch 16: drop path 0.5, layer decay 0.9, 75 epochs in ViTDet. Published for MAE (ViTDet): 56.7 / 50.2."""

_base_ = "semaim_mask_rcnn.py"

model = dict(backbone=dict(size="huge", drop_path_rate=0.5), neck=dict(in_channels=1280))
images_per_gpu = 1
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.9))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type="MultiStepLR", by_epoch=False, begin=0, end=138281, milestones=[122917, 133160], gamma=0.1),
]
train_cfg = dict(max_iters=138281)
