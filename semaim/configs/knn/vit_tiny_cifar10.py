"""For CIFAR-10: the encoder of semaim_vit_tiny_cifar10."""

_base_ = ["../_base_/features.py", "../_base_/small.py"]

model = dict(network=_base_._cifar10)
dataset = dict(root="data/cifar10", crop_pct=1.0)
num_workers = 1
