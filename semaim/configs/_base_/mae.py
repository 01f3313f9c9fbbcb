"""MAE's recipe: ViT-B/16, 75 % of the patches masked, a decoder of 8 blocks of width 512, total batch 4096."""

_base_ = "pretrain.py"

model = dict(
    network=dict(
        _delete_=True,
        type="MAE",
        size="base",
        img_size=224,
        patch_size=16,
        mask_ratio=0.75,
        decoder_embed_dim=512,
        decoder_depth=8,
        decoder_num_heads=16,
        target=dict(type="PixelTarget", blur_kernel=0, norm_pix=True),
    ),
)
total_batch_size = 4096
base_lr = 1.5e-4  # peak 2.4e-3 = 1.5e-4 x 4096 / 256
optim_wrapper = dict(clip_grad=None)
param_scheduler = dict(warmup=40 / 800)
default_hooks = dict(ema=None, pictures=None)
