"""Corrupted images of CIFAR-10: the encoder of semaim_vit_tiny_cifar10."""

_base_ = "../knn/vit_tiny_cifar10.py"

task = "corruptions"
evaluation = dict(_delete_=True, type="Corruptions")
