"""ViTDet's schedule: 100 epochs at batch 64 = 184,375 steps (64 x 184,375 / 118,000 images), AdamW, layer decay 0.7.

Weight decay acts on all but the norms inside the encoder and `pos_embed`: on biases, relative positions and the
LayerNorms of pyramid and heads too, as in detectron2.
"""

total_batch_size = 64
images_per_gpu = 4
base_lr = 1e-4
base_batch_size = 64  # another total batch scales the rate: base_lr x total / 64
optim_wrapper = dict(
    type="BFloat16OptimWrapper",
    constructor="GroupedOptimizer",
    optimizer=dict(type="AdamW", betas=(0.9, 0.999), weight_decay=0.1),
    paramwise_cfg=dict(layer_decay=0.7, undecayed=("pos_embed",), decay="all but norms"),
)
param_scheduler = dict(
    type="StepsWithWarmup",
    start_factor=0.001,
    warmup=250 / 184375,
    milestones=(0.888889, 0.962961),  # steps 163,889 and 177,546
    gamma=0.1,
)
train_cfg = dict(type="ResumableIterations", max_iters=184375, val_interval=5000)
