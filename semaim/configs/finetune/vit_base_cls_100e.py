"""ViT-B/16 with the class token in place of the mean of the patches, as SAIM fine-tunes."""

_base_ = "../_base_/finetune.py"

model = dict(network=dict(pool="cls"))
