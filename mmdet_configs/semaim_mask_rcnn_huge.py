"""ViT-H with patch 16: drop path 0.5, layer decay 0.9, 75 epochs in ViTDet. Published for MAE (ViTDet): 56.7 / 50.2.

Weight decay acts on everything, norms and `pos_embed` too, as in detectron2. MAE's ViT-H has patches of 14 pixels: its
projection is resampled to 16 as the file is loaded.
"""

_base_ = "semaim_mask_rcnn.py"

model = dict(backbone=dict(size="huge", drop_path_rate=0.5), neck=dict(in_channels=1280))
images_per_gpu = 1
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.9, undecayed=(), decay="all"))
param_scheduler = dict(warmup=188 / 138281)  # 250 x 75 / 100 = 187.5 steps
train_cfg = dict(max_iters=138281)
