"""160,000 steps at batch 16, AdamW, layer decay 0.65, bf16. The rate decides about 2 mIoU: search 1e-4 to 4e-4.

Weight decay falls on position and bias tables and the class token too, as in mmseg, whose constructor exempts only
names without "backbone." in front, which none has.
"""

total_batch_size = 16
images_per_gpu = 2
base_lr = 1e-4
base_batch_size = 16  # another total batch scales the rate: base_lr x total / 16
optim_wrapper = dict(
    type="BFloat16OptimWrapper",
    constructor="GroupedOptimizer",
    optimizer=dict(type="AdamW", betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(layer_decay=0.65),
)
param_scheduler = dict(
    type="PolyWithWarmup",
    start_factor=1e-6,
    warmup=1499 / 160000,  # 1,500 steps, of which the last has the peak
    min_lr=0.0,
    power=1.0,
)
train_cfg = dict(type="ResumableIterations", max_iters=160000, val_interval=16000)
