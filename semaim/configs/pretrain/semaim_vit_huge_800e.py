"""ViT-H with patch 16, a size that the official code has. No recipe and no result is published.

16 query blocks for 32 encoder blocks, one for every second as in ViT-L, are our choice: the official default of 12 does
not divide 32, and its forward pass fails. Trained weights: encoder 630.7 M, query blocks 314.8 M, head 10.5 M, in all
956.0 M.
"""

_base_ = "../_base_/pretrain.py"

model = dict(network=dict(size="huge", decoder_depth=16))
images_per_gpu = 64
