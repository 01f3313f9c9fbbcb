"""For the built-in scenes, on a CPU: any encoder at 96 pixels with patches of 8 (12 x 12), windows of 6."""

_base_ = "semaim_mask_rcnn_scenes.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="PlainViTDet",
        encoder=None,
        img_size=96,
        patch_size=8,
        window_size=None,
        global_blocks=None,
        prefix="seen",
        freeze=False,
        drop_path_rate=0.0,
    ),
    neck=dict(in_channels=None),
)
