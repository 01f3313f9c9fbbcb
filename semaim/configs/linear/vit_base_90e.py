"""The official protocol: random crops that are not resized, SGD."""

_base_ = "../_base_/linear.py"
