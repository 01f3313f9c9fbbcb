"""What the configs for frozen encoders lend to each other: DINOv2's linear segmentation, and k-NN of patches."""

_frozen = dict(type="FrozenViT", size="base", img_size=512, patch_size=16, last_blocks=1)
_any = dict(type="FrozenViT", encoder=None, img_size=512, patch_size=16, last_blocks=1)  # from the source of weights
_preprocessor = dict(
    type="SegDataPreProcessor",
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True,
    pad_val=0,
    seg_pad_val=255,
    size=(512, 512),
)
_head = dict(
    type="LinearHead",
    in_channels=768,
    num_classes=150,
    norm_cfg=dict(type="SyncBN"),
    align_corners=False,
    loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
)
_adamw = dict(
    type="DeferredOptimWrapper",  # fp32, as published
    constructor="GroupedOptimizer",
    optimizer=dict(type="AdamW", betas=(0.9, 0.999), weight_decay=1e-4),
    paramwise_cfg=dict(decay="all"),
)
_poly = dict(type="PolyWithWarmup", start_factor=1e-6, warmup=1499 / 40000, min_lr=0.0, power=1.0)
_neighbours = dict(type="DenseNeighbours", k=30, temperature=0.02, memory_size=1_024_000)
