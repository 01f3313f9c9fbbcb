"""ViT-L: blocks 7, 11, 15, 23 and drop path 0.2 as mmseg's BEiT-L, layer decay 0.75 as MAE's fine-tuning of ViT-L.

No recipe is published for SemAIM; for MAE 53.6 mIoU is published, without a config.
"""

_base_ = "semaim_upernet.py"

model = dict(
    backbone=dict(size="large", drop_path_rate=0.2, out_blocks=(7, 11, 15, 23)),
    neck=dict(embed_dim=1024),
    decode_head=dict(in_channels=[1024] * 4, channels=1024),
    auxiliary_head=dict(in_channels=1024),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.75))
