"""semaim_vit_tiny_scenes_easy with order and target features from the running average of the encoder."""

_base_ = "semaim_vit_tiny_scenes_easy.py"

model = dict(network=dict(guide="ema", target=dict(_delete_=True, type="FeatureTarget")))
