"""ViT-B/16, class token, as DINO and the official SemAIM measure it."""

_base_ = "../_base_/features.py"
