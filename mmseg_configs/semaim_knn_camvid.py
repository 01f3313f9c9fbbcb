"""k-NN segmentation of CamVid's street scenes: the encoder of semaim_vit_small_112px_300e, 224 x 224 pixels."""

_base_ = ["semaim_knn.py", "_base_/camvid.py"]

from semaim.data.pipelines import changed

model = dict(backbone=dict(size="small", img_size=224))
test_pipeline = changed(_base_.test_pipeline, Resize=dict(scale=(224, 224)))
train_dataset = dict(**_base_._camvid, pipeline=test_pipeline)
val_dataset = dict(**_base_._camvid, pipeline=test_pipeline)
most_ignored = 0.08
evaluation = dict(memory_size=102_400)
