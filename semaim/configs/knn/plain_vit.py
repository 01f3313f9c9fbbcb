"""k-NN for any encoder, by its own preparation of images, on the class token.

Without a class token: --cfg-options model.network.pool=avg, or native for the model's own pooling.
"""

_base_ = "../_base_/features.py"

model = dict(network=dict(size=None))
