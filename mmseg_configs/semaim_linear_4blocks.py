"""semaim_linear with the patches of the last four blocks, each after the final norm, concatenated."""

_base_ = "semaim_linear.py"

model = dict(backbone=dict(last_blocks=4), decode_head=dict(in_channels=[768] * 4, in_index=[0, 1, 2, 3]))
