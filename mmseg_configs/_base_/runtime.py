"""What every segmentor's run shares: log line, checkpoints, writers, seed."""

task = "segmentation"
default_scope = "mmseg"
num_workers = 4
seed = 0
default_hooks = dict(
    runtime_info=dict(type="LateRuntimeInfo"),
    timer=dict(type="IterTimerHook"),
    sampler_seed=None,  # the batch sampler seeds itself
    logger=dict(type="LoggerHook", interval=50),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="SaveCheckpoints", by_epoch=False, interval=8000, keep=3),
    progress=dict(type="ProgressBar"),
)
log_processor = dict(type="TrainLog", window_size=50, by_epoch=False)
visualizer = dict(
    type="Visualizer",
    vis_backends=[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")],
)
