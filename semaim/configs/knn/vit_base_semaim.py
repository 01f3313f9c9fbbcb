"""ViT-B/16, mean of the patches through a fresh LayerNorm, k as in the official SemAIM's main_knn.py.

So says the official command: its README has one, of ViT-L with --global_pool. The script's own default is the class
token, and the encoder's norm is not used with the mean. The released script stops before that, at `.target` of
torchvision's ImageFolder, which has `targets`.
"""

_base_ = "vit_base.py"

model = dict(network=dict(pool="avg", fc_norm=True, img_size=224))
dataset = dict(crop_pct=0.875)
evaluation = dict(ks=(10, 20, 30))
