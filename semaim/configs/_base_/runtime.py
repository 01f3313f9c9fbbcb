"""What every stage on images shares."""

_base_ = "common.py"

default_scope = "semaim"
compile = "auto"
num_workers = 8
