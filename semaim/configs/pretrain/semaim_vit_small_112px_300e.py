"""For one GPU and a small folder of images: ViT-S/16 at 112 px (7 x 7 patches), 300 epochs."""

_base_ = "../_base_/pretrain.py"

model = dict(network=dict(size="small", img_size=112))
total_batch_size = 512
base_lr = 2.5e-4  # peak 5e-4 = 2.5e-4 x 512 / 256
param_scheduler = dict(warmup=15 / 300)
train_cfg = dict(max_epochs=300)
