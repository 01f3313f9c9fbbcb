"""What every stage on images shares."""

_base_ = "common.py"

default_scope = "mmengine"  # our types are in its root registries
compile = False
num_workers = 8
