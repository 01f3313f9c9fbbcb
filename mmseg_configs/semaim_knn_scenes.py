"""k-NN segmentation of the built-in scenes, on a CPU: the encoder of semaim_vit_tiny_scenes, 128 x 128 pixels."""

_base_ = ["semaim_knn.py", "../semaim/configs/_base_/small.py"]

from semaim.data.pipelines import changed

_names = (*_base_._classes, "background")
_data = dict(
    type="BaseSegDataset",
    data_root="data/scenes/ade",
    metainfo=dict(classes=_names, palette=_base_._palette),
    reduce_zero_label=True,
)
model = dict(backbone=dict(**{**_base_._scenes, "img_size": 128}))
test_pipeline = changed(_base_.test_pipeline, Resize=dict(scale=(128, 128)))
train_dataset = dict(**_data, pipeline=test_pipeline)
val_dataset = dict(**_data, pipeline=test_pipeline)
num_workers = 1
evaluation = dict(memory_size=102_400)
