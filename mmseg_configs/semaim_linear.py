"""Linear segmentation of a frozen ViT-B, as DINOv2: batch normalisation and a 1 x 1 convolution on its patches."""

_base_ = ["_base_/ade20k.py", "_base_/runtime.py", "_base_/frozen.py"]

from semaim.data.pipelines import changed

task = "linear_segmentation"
_scale = (99999999, 512)  # the short side is 512
model = dict(
    type="EncoderDecoder",
    data_preprocessor=_base_._preprocessor,
    backbone=_base_._frozen,
    decode_head=_base_._head,
    train_cfg=dict(),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
train_dataset = dict(pipeline=changed(_base_.train_dataset.pipeline, RandomResize=dict(scale=_scale)))
test_pipeline = changed(_base_.test_pipeline, Resize=dict(scale=_scale))
val_dataset = dict(pipeline=test_pipeline)
total_batch_size = 16
images_per_gpu = 16
base_lr = 1e-3
base_batch_size = 16
optim_wrapper = _base_._adamw
param_scheduler = _base_._poly
train_cfg = dict(type="ResumableIterations", max_iters=40000, val_interval=10000)
default_hooks = dict(checkpoint=dict(interval=10000))
