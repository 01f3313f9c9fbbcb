"""A first segmentor on photographs of your own, with any encoder: crops of 224 pixels, a narrow UperNet, 500 steps.

`--data-root DIR --classes NAME,...` or `--data FILE.yaml` names the data: docs/own_data.md. Patches are the encoder's.
"""

_base_ = "plain_upernet.py"

from semaim.data.pipelines import changed

own_data = dict()  # the run fills it in
_size = (224, 224)
model = dict(
    data_preprocessor=dict(size=_size),
    backbone=dict(img_size=224, patch_size=None, drop_path_rate=0.0),
    decode_head=dict(channels=64),
    auxiliary_head=dict(channels=32),
    test_cfg=dict(_delete_=True, mode="whole"),
)
train_dataset = dict(
    pipeline=changed(
        _base_.train_dataset.pipeline,
        RandomResize=dict(scale=(448, 224), ratio_range=(0.7, 1.4)),
        RandomCrop=dict(crop_size=_size, cat_max_ratio=0.9),
    )
)
test_pipeline = changed(_base_.test_pipeline, Resize=dict(scale=(448, 224)))
val_dataset = dict(pipeline=test_pipeline)
tta_ratios = (1.0, 1.25, 1.5)
total_batch_size = 8
images_per_gpu = 8
num_workers = 2
base_lr = 1e-3  # peak 5e-4 = 1e-3 x 8 / 16
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.75))
param_scheduler = dict(start_factor=1e-3, warmup=49 / 500)
train_cfg = dict(max_iters=500, val_interval=250)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=100))
