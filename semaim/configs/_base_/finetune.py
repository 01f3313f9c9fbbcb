"""Fine-tuning by SemAIM's recipe: ViT-B/16, 224 px, 100 epochs, total batch 1024, layer decay 0.65.

MAE's recipe differs in its warm-up only, of 5 epochs.
"""

_base_ = "runtime.py"

task = "finetune"
model = dict(
    type="Classification",
    network=dict(
        type="Classifier",
        size="base",
        img_size=224,
        patch_size=16,
        num_classes=None,  # as many as the data has
        pool="avg",
        drop_path_rate=0.1,
        head_init_std=2e-5,
    ),
    mixup=0.8,
    cutmix=1.0,
    label_smoothing=0.1,
    precision="bf16",
)

dataset = dict(
    type="LabelledImages",
    root="data/imagenet",
    augment="randaugment",
    min_scale=0.08,
    rand_augment="rand-m9-mstd0.5-inc1",
    random_erase=0.25,
    crop_pct=0.875,
)
total_batch_size = 1024
images_per_gpu = 128

base_lr = 5e-4  # peak 2e-3 = 5e-4 x 1024 / 256
optim_wrapper = dict(
    type="DeferredOptimWrapper",
    constructor="GroupedOptimizer",
    optimizer=dict(type="AdamW", betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(layer_decay=0.65, undecayed=("cls_token", "pos_embed")),
)
param_scheduler = dict(type="CosineWithWarmup", warmup=20 / 100, min_lr=1e-6)
train_cfg = dict(type="ResumableLoop", max_epochs=100, val_interval=1)
default_hooks = dict(logger=dict(interval=50), checkpoint=dict(interval=5))
