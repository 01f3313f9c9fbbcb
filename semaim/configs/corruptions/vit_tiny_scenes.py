"""Corrupted images of the built-in scenes: the encoder of semaim_vit_tiny_scenes."""

_base_ = "../knn/vit_tiny_scenes.py"

task = "corruptions"
evaluation = dict(_delete_=True, type="Corruptions", batch=64)
