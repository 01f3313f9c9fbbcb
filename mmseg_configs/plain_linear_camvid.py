"""semaim_linear_camvid for any encoder."""

_base_ = "semaim_linear_camvid.py"

model = dict(backbone=dict(_base_._any, _delete_=True, img_size=224), decode_head=dict(in_channels=None))
