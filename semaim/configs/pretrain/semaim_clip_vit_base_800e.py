"""SemAIM*: order and target features from CLIP's ViT-B/16, projected to 512 channels. Published: 85.3 top-1."""

_base_ = "../_base_/pretrain.py"

model = dict(
    network=dict(
        guide=dict(_delete_=True, type="Teacher", name="vit_base_patch16_clip_224.openai", project=True),
        target=dict(_delete_=True, type="FeatureTarget"),
    )
)
