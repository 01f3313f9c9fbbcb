"""SimMIM by its own recipe, on the suite's plain ViT; what differs stands in semaim/methods/simmim.py."""

_base_ = "../_base_/simmim.py"
