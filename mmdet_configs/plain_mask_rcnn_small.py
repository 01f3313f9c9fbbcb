"""A first detector on photographs of your own, with any encoder: 320 pixels, patches of 16, narrow heads, 1,000 steps.

`--data-root DIR` or `--data FILE.yaml` names the data, COCO's files: docs/own_data.md. The classes are theirs.
"""

_base_ = "_base_/small.py"

from semaim.data.pipelines import changed

own_data = dict()  # the run fills it in
_side = 320
model = dict(
    data_preprocessor=dict(side=_side),
    backbone=dict(
        _delete_=True,
        type="PlainViTDet",
        encoder=None,  # from the source of the weights
        img_size=_side,
        patch_size=16,
        window_size=None,  # 10, which divides 20
        global_blocks=None,
        prefix="seen",
        freeze=False,
        drop_path_rate=0.0,
    ),
    neck=dict(in_channels=None),  # as wide as the encoder
    train_cfg=dict(rpn_proposal=dict(nms_pre=500, max_per_img=200), rcnn=dict(sampler=dict(num=128))),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=200)),
)
train_dataset = dict(
    pipeline=changed(
        _base_.train_dataset.pipeline,
        ResizeScale=dict(scale=(_side, _side)),
        FixedSizeCrop=dict(crop_size=(_side, _side)),
    )
)
test_pipeline = changed(_base_.test_pipeline, ResizeShortestEdge=dict(scale=_side, max_size=_side))
val_dataset = dict(pipeline=test_pipeline)
num_workers = 2
base_lr = 4e-3  # peak 5e-4 = 4e-3 x 8 / 64
param_scheduler = dict(warmup=49 / 1000, milestones=(0.8, 0.925))
train_cfg = dict(max_iters=1000, val_interval=500)
default_hooks = dict(checkpoint=dict(interval=100))
