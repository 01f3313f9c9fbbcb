"""For the built-in scenes on a CPU: a slim ViT at 64 px with 8 px patches, which two cores train in minutes."""

_base_ = "../_base_/pretrain.py"

model = dict(
    network=dict(
        size="tiny", depth=6, img_size=64, patch_size=8, target=dict(blur_kernel=5, blur_sigma=0.5)
    )
)
dataset = dict(root="data/scenes/classes", img_size=64, patch_size=8)
total_batch_size = 64
num_workers = 1
base_lr = 2e-3  # peak 5e-4 = 2e-3 x 64 / 256
param_scheduler = dict(warmup_epochs=2)
train_cfg = dict(max_epochs=20)
default_hooks = dict(checkpoint=dict(interval=5), pictures=dict(interval=10))
