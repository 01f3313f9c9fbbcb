"""Time until the first step: imports, config, model, first batch, and the step itself, in fresh processes."""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from semaim.benchmarks.rows import Row
from semaim.errors import UserError

#: Imports of each row: ours, and the libraries below it. A row is left out if a package is not installed.
IMPORTS = {
    "import what pretraining needs": ("semaim.engine.training", "torch, torchvision, timm, mmengine.runner"),
    "import what detectors need": ("semaim.engine.dense, semaim.detection", "torch, mmengine.runner"),
}

#: Seconds since the start of the process after each part; `{root}` and `{config}` are filled in.
FIRST_STEP = """
import time; start = time.perf_counter(); marks = {{}}
from semaim.engine.config import load_config
from semaim.engine.images import build_datasets
import torch
from semaim.registry import build_model
from semaim.engine.runner import training_loader
from semaim.engine.schedule import plan_batch
marks["imports"] = time.perf_counter() - start
cfg = load_config("{config}", {{"dataset.root": "{root}", "total_batch_size": 16, "num_workers": {workers}}})
marks["config"] = time.perf_counter() - start
images, _ = build_datasets(cfg, labelled=False)
model = build_model(cfg.model)
marks["model"] = time.perf_counter() - start
plan = plan_batch(cfg.total_batch_size, 1, cfg.images_per_gpu, cfg.base_lr)
batch = next(iter(training_loader(images, plan, 0, cfg.num_workers)))
marks["first batch"] = time.perf_counter() - start
data = model.data_preprocessor(batch, True)
model(**data)["loss"].backward()
marks["first step"] = time.perf_counter() - start
print(marks)
"""


def run(code: str) -> str:
    """The last line that code prints in a fresh Python process."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError(f"start-up could not be measured: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return done.stdout.strip().splitlines()[-1]


def import_seconds(names: str) -> float:
    """Time of an import statement in a fresh process."""
    return float(run(f"import time; t = time.perf_counter(); import {names}; print(time.perf_counter() - t)"))


def startup(repeats: int = 3, workers: int = 1) -> list[Row]:
    """Imports against those of the libraries alone, then each part until the first step of the smallest config."""
    import ast
    from importlib.util import find_spec

    from semaim.data.scenes import write_scenes

    rows = []
    for what, (ours, floor) in IMPORTS.items():
        if "detection" in ours and find_spec("mmdet") is None:
            continue
        if repeats > 1:
            import_seconds(ours)  # so that the files are in the disk cache
        turns = [(import_seconds(ours), import_seconds(floor)) for _ in range(repeats)]
        a, b = (statistics.median(column) for column in zip(*turns, strict=True))
        ratios = [first / second for first, second in turns]
        rows.append(
            Row(
                what, "CPU", "s", at_least=False, ours=a, baseline=b, ratio=statistics.median(ratios),
                spread=(min(ratios), max(ratios)), details={"ours": ours, "baseline": floor, "repeats": repeats},
            )
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        write_scenes(Path(folder) / "scenes", 32, 64, seed=0)
        code = FIRST_STEP.format(
            root=Path(folder) / "scenes" / "classes",
            config="semaim/configs/pretrain/semaim_vit_tiny_scenes.py",
            workers=workers,
        )
        found = [ast.literal_eval(run(code)) for _ in range(repeats)]
    before = 0.0
    for part in found[0]:
        until = statistics.median(one[part] for one in found)
        rows.append(
            Row(f"until the first step: {part}", "CPU", "s", ours=until - before, details={"since_start": until})
        )
        before = until
    return rows + [Row("until the first step: in all", "CPU", "s", ours=before, details={"repeats": repeats})]
