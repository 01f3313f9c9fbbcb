"""Linear segmentation of any frozen encoder, from --pretrained, with patches of 16."""

_base_ = "semaim_linear.py"

model = dict(backbone=dict(_base_._any, _delete_=True), decode_head=dict(in_channels=None))  # as wide as the encoder
