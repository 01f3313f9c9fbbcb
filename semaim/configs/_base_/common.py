"""What all runs share: hooks, log line, writers, seed."""

seed = 0
default_hooks = dict(
    runtime_info=dict(type="DeferredRuntimeInfo"),
    timer=dict(type="IterTimerHook"),
    sampler_seed=None,  # the batch sampler seeds itself
    logger=dict(type="LoggerHook", interval=20),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="SaveCheckpoints", interval=20, keep=3),
    progress=dict(type="ProgressBar"),
)
log_processor = dict(type="TrainLog", window_size=20)
visualizer = dict(
    type="Visualizer",
    vis_backends=[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")],
)
