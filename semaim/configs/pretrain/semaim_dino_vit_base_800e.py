"""Order and target features from DINO's ViT-B/16 (768 channels)."""

_base_ = "../_base_/pretrain.py"

model = dict(
    network=dict(
        guide=dict(_delete_=True, type="Teacher", name="vit_base_patch16_224.dino"),
        target=dict(_delete_=True, type="FeatureTarget"),
    )
)
