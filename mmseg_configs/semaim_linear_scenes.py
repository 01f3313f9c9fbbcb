"""Linear segmentation of the built-in scenes, on a CPU: the frozen encoder of semaim_vit_tiny_scenes, 128 pixels."""

_base_ = ["semaim_upernet_scenes.py", "_base_/frozen.py"]

task = "linear_segmentation"
_classes = len(_base_.train_dataset.metainfo.classes)
model = dict(
    _delete_=True,
    type="EncoderDecoder",
    data_preprocessor=dict(_base_._preprocessor, size=(128, 128)),
    backbone=dict(_base_._frozen, **{**_base_._scenes, "img_size": 128}),
    decode_head=dict(_base_._head, in_channels=192, num_classes=_classes),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
optim_wrapper = dict(_base_._adamw, _delete_=True)
base_lr = 2e-3  # peak 1e-3 = 2e-3 x 8 / 16
