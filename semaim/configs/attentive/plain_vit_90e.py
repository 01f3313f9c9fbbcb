"""Efficient probing of any encoder by its published protocol, on its tokens after the final norm.

Images are prepared as the encoder's own are: size, crop of the evaluation, mean and standard deviation.
"""

_base_ = "vit_base_90e.py"

model = dict(network=dict(size=None, img_size=None))
dataset = dict(crop_pct=None)
