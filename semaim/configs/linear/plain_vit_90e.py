"""Linear probing of any encoder by MAE's protocol, which resizes the crops: LARS, total batch 16384, 90 epochs.

Images are prepared as the encoder's own are: size, crop of the evaluation, mean and standard deviation.
"""

_base_ = "vit_base_90e_mae.py"

model = dict(network=dict(size=None, img_size=None))
dataset = dict(crop_pct=None)
