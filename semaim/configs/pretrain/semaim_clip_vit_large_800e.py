"""SemAIM* with ViT-L. Published: 86.5 ImageNet top-1 after fine-tuning.

Which CLIP taught it, and how many query blocks it had, is not published: the teacher is ViT-B's, the only one that the
official code loads, and the 12 query blocks are that code's default.
"""

_base_ = "semaim_clip_vit_base_800e.py"

model = dict(network=dict(size="large", decoder_depth=12))
images_per_gpu = 128
