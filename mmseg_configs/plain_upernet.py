"""UperNet on any encoder, by the recipe released for MAE: crops of 512 px, four maps, patches of 16.

The encoder comes from --pretrained; its positions are its own, and it gets no further relative ones. Layers for the
layer-wise learning rates are those of its family.
"""

_base_ = "semaim_upernet.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="PlainSegmentationViT",
        encoder=None,  # from the source of the weights
        img_size=512,
        patch_size=16,
        out_blocks=None,  # 3, 5, 7, 11 of 12, else the last of each quarter
        freeze=False,
        drop_path_rate=0.1,
    ),
    neck=dict(embed_dim=None),  # as wide as the encoder
    decode_head=dict(in_channels=None),
    auxiliary_head=dict(in_channels=None),
)
