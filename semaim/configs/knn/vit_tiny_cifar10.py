"""For CIFAR-10: the encoder of semaim_vit_tiny_cifar10."""

_base_ = "../_base_/features.py"

model = dict(network=dict(size="tiny", embed_dim=128, depth=4, num_heads=4, img_size=32, patch_size=4))
dataset = dict(root="data/cifar10", crop_pct=1.0)
num_workers = 1
