"""For the built-in scenes, on a CPU: any encoder on crops of 128 pixels with patches of 8, 21 classes."""

_base_ = "semaim_upernet_scenes.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="PlainSegmentationViT",
        encoder=None,
        img_size=128,
        patch_size=8,
        out_blocks=None,
        freeze=False,
        drop_path_rate=0.0,
    ),
    neck=dict(embed_dim=None),
    decode_head=dict(in_channels=None),
    auxiliary_head=dict(in_channels=None),
)
