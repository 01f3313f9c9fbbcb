"""Order and target features from the running average of the encoder."""

_base_ = "../_base_/pretrain.py"

model = dict(network=dict(guide="ema", target=dict(_delete_=True, type="FeatureTarget")))
