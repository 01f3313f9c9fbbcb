"""Linear segmentation on CamVid's street scenes: the encoder of semaim_vit_small_112px_300e, crops of 224 pixels."""

_base_ = ["semaim_upernet_camvid.py", "_base_/frozen.py"]

task = "linear_segmentation"
_classes = len(_base_.train_dataset.metainfo.classes)
model = dict(
    _delete_=True,
    type="EncoderDecoder",
    data_preprocessor=dict(_base_._preprocessor, size=(224, 224)),
    backbone=dict(_base_._frozen, size="small", img_size=224),
    decode_head=dict(_base_._head, in_channels=384, num_classes=_classes),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
optim_wrapper = dict(_base_._adamw, _delete_=True)
base_lr = 2e-3  # peak 1e-3 = 2e-3 x 8 / 16
