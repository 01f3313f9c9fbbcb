"""One card: 4 images a pass, 4 accumulated, activations computed again; the steps are those of 8 cards."""

_base_ = "semaim_upernet.py"

model = dict(backbone=dict(with_cp=True))
images_per_gpu = 4
