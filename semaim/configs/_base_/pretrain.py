"""SemAIM's recipe: ViT-B/16, 224 px, pixels, total batch 2048, AdamW, cosine. Configs name only what differs."""

_base_ = "runtime.py"

task = "pretrain"
model = dict(
    type="Pretraining",
    network=dict(
        type="SemAIM",
        size="base",
        img_size=224,
        patch_size=16,
        order="semantic",
        similarity="cls",
        guide="online",
        head="mlp",
        look_precision="same",  # on a GPU bf16; the official code makes the order of pixel targets in fp32: "fp32"
        target=dict(type="PixelTarget", blur_kernel=9, blur_sigma=1.0, norm_pix=True, loss="l2"),
    ),
    precision="bf16",
)

dataset = dict(type="PretrainImages", root="data/imagenet", min_scale=0.2)  # crops as large as the network's images
total_batch_size = 2048
images_per_gpu = 256

base_lr = 2e-4  # peak 1.6e-3 = 2e-4 x 2048 / 256
optim_wrapper = dict(
    type="DeferredOptimWrapper",
    constructor="GroupedOptimizer",
    optimizer=dict(type="AdamW", betas=(0.9, 0.95), weight_decay=0.05),
    clip_grad=dict(max_norm=3.0),
)
param_scheduler = dict(type="CosineWithWarmup", warmup=30 / 800, min_lr=0.0)
train_cfg = dict(type="ResumableLoop", max_epochs=800)

default_hooks = dict(ema=dict(type="UpdateEma"), pictures=dict(type="OrderPictures", interval=20, images=8))
