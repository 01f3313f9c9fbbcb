"""Linear segmentation of the easy scenes, on a CPU: the frozen encoder of semaim_vit_tiny_scenes_easy, 96 pixels."""

_base_ = ["semaim_upernet_scenes_easy.py", "_base_/frozen.py"]

task = "linear_segmentation"
_classes = len(_base_.train_dataset.metainfo.classes)
model = dict(
    _delete_=True,
    type="EncoderDecoder",
    data_preprocessor=dict(_base_._preprocessor, size=(96, 96)),
    backbone=dict(_base_._frozen, **{**_base_._scenes_easy, "img_size": 96}),
    decode_head=dict(_base_._head, in_channels=128, num_classes=_classes),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
optim_wrapper = dict(_base_._adamw, _delete_=True)
