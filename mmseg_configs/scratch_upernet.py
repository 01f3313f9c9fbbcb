"""The baseline without pretraining, all else equal: run it without --pretrained."""

_base_ = "semaim_upernet.py"
