"""The baseline SAIM: a random order, all else as SemAIM. Published under its own recipe, which does not clip
gradients: 83.9 ImageNet top-1."""

_base_ = "../_base_/pretrain.py"

model = dict(network=dict(order="stochastic"))
