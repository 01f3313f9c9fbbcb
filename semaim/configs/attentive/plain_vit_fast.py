"""The fast attentive probe for any encoder, by its own preparation of images. Not comparable with published probes."""

_base_ = "vit_base_fast.py"

model = dict(network=dict(size=None))
