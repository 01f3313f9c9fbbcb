"""The paper's main setting: ViT-B/16, pixels, 800 epochs. Published: 84.1 ImageNet top-1 after fine-tuning.

12 query blocks for 12 encoder blocks. Trained weights: encoder 85.6 M, query blocks 85.1 M, head 4.7 M, in all 175.4 M.
"""

_base_ = "../_base_/pretrain.py"
