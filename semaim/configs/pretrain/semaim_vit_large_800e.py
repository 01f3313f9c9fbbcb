"""Published: 85.8 ImageNet top-1 after fine-tuning; the recipe of ViT-L is not, so it is ViT-B's.

12 query blocks for 24 encoder blocks: the official script's default, and what its one published command, ViT-B's, gives
too. Trained weights: encoder 303.1 M, query blocks 151.2 M, head 7.3 M, in all 461.6 M.
"""

_base_ = "../_base_/pretrain.py"

model = dict(network=dict(size="large", decoder_depth=12))
images_per_gpu = 128
