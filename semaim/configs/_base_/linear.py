"""Linear probing by the official SemAIM's recipe: frozen encoder, class token, SGD, 90 epochs, total batch 4096."""

_base_ = "runtime.py"

task = "linear"
model = dict(
    type="Classification",
    network=dict(
        type="Classifier",
        size="base",
        img_size=224,
        patch_size=16,
        num_classes=None,  # as many as the data has
        pool="cls",
        probe=True,
        head_init_std=0.01,
    ),
    precision="bf16",
)

dataset = dict(type="LabelledImages", root="data/imagenet", augment="random_crop", min_scale=0.08, crop_pct=0.875)
total_batch_size = 4096
images_per_gpu = 512

base_lr = 0.1  # peak 1.6 = 0.1 x 4096 / 256
optim_wrapper = dict(
    type="DeferredOptimWrapper",
    constructor="GroupedOptimizer",
    optimizer=dict(type="SGD", momentum=0.9, weight_decay=0.0),
)
param_scheduler = dict(type="CosineWithWarmup", warmup=0.0, min_lr=0.0)
train_cfg = dict(type="ResumableLoop", max_epochs=90, val_interval=1)
default_hooks = dict(logger=dict(interval=50), checkpoint=dict(interval=5))
