"""Mask R-CNN on any encoder, by ViTDet's recipe and schedule: 1024 px, patches of 16, windows in all but four blocks.

The encoder comes from --pretrained. Patches see its prefix tokens (class token, registers) in every block; positions
are its own, so there are no further relative ones. Set the drop path rate by size: 0.1 for B, 0.4 for L.
"""

_base_ = "semaim_mask_rcnn.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="PlainViTDet",
        encoder=None,  # from the source of the weights
        img_size=1024,
        patch_size=16,
        window_size=None,  # 16, which divides 64; or the encoder's own tables of relative positions
        global_blocks=None,  # the last of each quarter
        prefix="seen",
        freeze=False,
        drop_path_rate=0.1,
    ),
    neck=dict(in_channels=None),  # as wide as the encoder
)
