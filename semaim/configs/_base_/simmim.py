"""SimMIM's recipe: ViT-B/16, 60 % of the image masked in squares of 32 px, L1 loss on pixels, total batch 2048."""

_base_ = "pretrain.py"

model = dict(
    network=dict(
        _delete_=True,
        type="SimMIM",
        size="base",
        img_size=224,
        patch_size=16,
        mask_ratio=0.6,
        mask_size=32,
        drop_path_rate=0.1,
        target=dict(type="PixelTarget", blur_kernel=0, norm_pix=False, loss="l1"),
    ),
)
dataset = dict(min_scale=0.67)
base_lr = 5e-5  # peak 4e-4 = 5e-5 x 2048 / 256
optim_wrapper = dict(optimizer=dict(betas=(0.9, 0.999)), clip_grad=dict(max_norm=5.0))
param_scheduler = dict(
    _delete_=True, type="StepsWithWarmup", warmup=10 / 800, start_factor=0.005, milestones=(700 / 800,), gamma=0.1
)
default_hooks = dict(ema=None)
