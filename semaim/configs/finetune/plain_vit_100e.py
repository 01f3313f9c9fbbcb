"""Fine-tuning of any encoder by the recipe for ViT-B, on the mean of its patches after the final norm.

Images are prepared as the encoder's own are. Layers for the layer-wise learning rates are those of the encoder's
family, and what has no weight decay is what its family says.
"""

_base_ = "vit_base_100e.py"

model = dict(network=dict(size=None, img_size=None))
dataset = dict(crop_pct=None)
