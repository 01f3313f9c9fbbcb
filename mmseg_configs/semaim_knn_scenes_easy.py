"""k-NN segmentation of the easy scenes, on a CPU: the encoder of semaim_vit_tiny_scenes_easy, 96 x 96 pixels."""

_base_ = "semaim_knn_scenes.py"

from semaim.data.pipelines import changed

_names = (*_base_._classes_easy, "background")
_data = dict(data_root="data/scenes_easy/ade", metainfo=dict(classes=_names, palette=_base_._palette[: len(_names)]))
model = dict(backbone=dict(embed_dim=128, num_heads=2, img_size=96))
test_pipeline = changed(_base_.test_pipeline, Resize=dict(scale=(96, 96)))
train_dataset = dict(**_data, pipeline=test_pipeline)
val_dataset = dict(**_data, pipeline=test_pipeline)
