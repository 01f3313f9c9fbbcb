"""semaim_knn_camvid for any encoder."""

_base_ = "semaim_knn_camvid.py"

model = dict(backbone=dict(_base_._any, _delete_=True, img_size=224))
