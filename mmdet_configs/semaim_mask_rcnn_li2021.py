"""The recipe before ViTDet's (Li et al. 2021, as hustvl/MIMDet has it): it gives MAE 50.3 / 44.9, the paper's baseline.

An ordinary FPN on the maps after blocks 2, 5, 8, 11, windows of 16, SyncBN, one learning rate for all layers, cosine.
Flips, filling and positions are as in ViTDet here: docs/recipes.md has what differs from hustvl/MIMDet.
"""

_base_ = "semaim_mask_rcnn.py"

_norm = dict(type="PreciseSyncBN", requires_grad=True, eps=1e-5)  # else the heads keep the 1e-6 of their LayerNorms
model = dict(
    backbone=dict(window_size=16, out_blocks=(2, 5, 8, 11)),
    neck=[
        dict(type="MapScales", channels=768),
        dict(type="FPN", in_channels=[768] * 4, out_channels=256, num_outs=5, norm_cfg=_norm),
    ],
    roi_head=dict(bbox_head=dict(norm_cfg=_norm), mask_head=dict(norm_cfg=_norm)),
)
base_lr = 8e-5
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=1.0, undecayed=("pos_embed", "rel_pos_h", "rel_pos_w")))
param_scheduler = dict(
    _delete_=True,
    type="CosineWithWarmup",
    start_factor=0.001,
    warmup=461 / 184375,  # a quarter of an epoch
    from_start=True,
)
