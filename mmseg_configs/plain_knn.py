"""k-NN segmentation of any frozen encoder, with patches of 16."""

_base_ = "semaim_knn.py"

model = dict(backbone=dict(_base_._any, _delete_=True))
