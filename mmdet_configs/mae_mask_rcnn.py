"""The baseline: ViT-B from MAE, all else equal. MAE's checkpoint by --pretrained. Published (ViTDet): 51.6 / 45.9."""

_base_ = "semaim_mask_rcnn.py"
