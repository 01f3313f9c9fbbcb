"""semaim_linear_scenes for any encoder, with patches of 8."""

_base_ = "semaim_linear_scenes.py"

model = dict(
    backbone=dict(_base_._any, _delete_=True, img_size=128, patch_size=8),
    decode_head=dict(in_channels=None),
)
