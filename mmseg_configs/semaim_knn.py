"""k-NN segmentation of a frozen ViT-B: images stretched to 512 x 512, 30 neighbours among 1,024,000 patches."""

_base_ = ["_base_/ade20k.py", "_base_/runtime.py", "_base_/frozen.py"]

from semaim.data.pipelines import changed

task = "knn_segmentation"
model = dict(type="FrozenPatches", data_preprocessor=dict(_base_._preprocessor, size=None), backbone=_base_._frozen)
test_pipeline = changed(_base_.test_pipeline, Resize=dict(scale=(512, 512), keep_ratio=False))
train_dataset = dict(pipeline=test_pipeline)  # without augmentation
val_dataset = dict(pipeline=test_pipeline)
images_per_gpu = 16
evaluation = _base_._neighbours
