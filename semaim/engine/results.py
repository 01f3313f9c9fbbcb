"""What a stage measured, and where it came from: `results.json` in its work folder."""

import datetime
import json
import os
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.dist import get_world_size, is_main_process

from semaim import __version__


def write_results(
    cfg: Config, metrics: dict, train_images: int, val_images: int, checkpoint: str | None, **more
) -> None:
    """Write `results.json`, on the main process.

    Args:
        cfg: of the run; names the work folder.
        metrics: name -> number.
        train_images, val_images: how many were trained (or searched) and evaluated on.
        checkpoint: whose encoder was measured; None for random weights.
        **more: further plain values; `data`, where it is not `cfg.dataset.root`.
    """
    if not is_main_process():
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    results = {
        "config": cfg.filename and os.path.basename(cfg.filename),
        "metrics": {name: float(value) for name, value in metrics.items()},  # some are numpy's
        "checkpoint": checkpoint,
        "data": str(more.pop("data", None) or cfg.dataset.root),
        "train_images": train_images,
        "val_images": val_images,
        "seed": cfg.seed,
        **more,
        "device": f"{get_world_size()} x {device}",
        "semaim": __version__,
        "torch": torch.__version__,
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
    }
    folder = Path(cfg.work_dir)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".results.partial"
    partial.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(partial, folder / "results.json")
