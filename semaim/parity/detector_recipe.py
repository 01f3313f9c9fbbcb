"""The recipe of ViTDet's detectors against detectron2: resizing of photos, and optimizer settings of each parameter."""

from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, TRANSFORMS
from torch import Tensor, nn

from semaim.engine import dense
from semaim.engine.config import load_config
from semaim.engine.optim import group_model
from semaim.engine.schedule import milestones_in_steps
from semaim.parity.cases import EXACT, Case, CaseReport
from semaim.places import own_config

#: Boxes are fp32 in mmdet, with a relative error of 2^-24 per operation: 512 x 3 x 2^-24 = 9e-5.
BOX = 1e-4

#: Letter of a size in detectron2's projects/ViTDet -> suffix of our config.
SIZES = {"b": "", "l": "_large", "h": "_huge"}


def check_resize(case: Case, report: CaseReport) -> None:
    """Pixels, masks and boxes of photos resized by given scales and as in testing, and the sizes of many photos."""
    for image in sorted({name.split(".")[0] for name in case.tensors}):
        for what in [f"scale_{scale}" for scale in case.meta["config"]["scales"]] + ["shortest_edge"]:
            transform = _resizing(what, case.meta["config"]["target"])
            inputs = {part: case.tensors[f"{image}.{part}"].numpy() for part in ("image", "mask", "box")}
            for part, ours in _resized(transform, **inputs).items():
                name = f"{image}.{what}.{part}"
                if name in case.tensors:
                    report.add(name, ours, case.tensors[name], BOX if part == "box" else EXACT)
                elif part == "mask":
                    report.add_relative(f"{name}_sum", float(ours.double().sum()), case.scalars[f"{name}_sum"])
                else:  # too large to be recorded in full
                    recorded, pixels = case.scalars[f"{image}.{what}"], ours.double()
                    report.add(f"{name}.size", torch.tensor(ours.shape[:2]), torch.tensor(recorded["size"]), EXACT)
                    report.add_relative(f"{name}.sum", float(pixels.sum()), recorded["sum"])
                    report.add_relative(f"{name}.squares", float(pixels.square().sum()), recorded["sum_of_squares"])
    for height, width, scale, *size in case.scalars["resize_scale_sizes_target_1024"]["rows"]:
        ours = _resizing(f"scale_{scale}", 1024).size(height, width, scale)
        report.add(f"size.{height}x{width}.scale_{scale}", torch.tensor(ours[::-1]), torch.tensor(size), EXACT)
    for height, width, *size in case.scalars["shortest_edge_sizes_1024"]["rows"]:
        blank = {"img": np.zeros((height, width, 3), np.uint8)}
        ours = _resizing("shortest_edge", 1024)(blank)["img_shape"]
        report.add(f"size.{height}x{width}.shortest_edge", torch.tensor(ours), torch.tensor(size), EXACT)


def _resizing(what: str, target: int):
    """The step of the configs' pipelines that resizes: in training to one scale, or in testing."""
    cfg = load_config(own_config("mmdet_configs/semaim_mask_rcnn.py"))
    dense.enter(cfg)
    if what == "shortest_edge":
        step = next(step for step in cfg.test_pipeline if "max_size" in step)
        return TRANSFORMS.build({**step, "scale": target, "max_size": target})
    step = next(step for step in cfg.train_dataset.pipeline if "ratio_range" in step)
    ratio = float(what.removeprefix("scale_"))
    return TRANSFORMS.build({**step, "scale": (target, target), "ratio_range": (ratio, ratio)})


def _resized(transform, image: np.ndarray, mask: np.ndarray, box: np.ndarray) -> dict[str, Tensor]:
    """Apply the transform to a photo (H, W, 3), a mask (H, W) and its box (1, 4)."""
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks

    boxes = HorizontalBoxes(torch.from_numpy(box).float())
    found = transform({"img": image, "gt_bboxes": boxes, "gt_masks": BitmapMasks(mask[None], *mask.shape)})
    masks = torch.from_numpy(found["gt_masks"].masks[0])
    return {"image": torch.from_numpy(found["img"]), "mask": masks, "box": found["gt_bboxes"].tensor}


def check_keys(case: Case, report: CaseReport) -> None:
    """Names and shapes of all weights, their weight decay and learning rate factor, and the schedule."""
    from semaim.detection.detectron2_names import our_name

    for theirs, shapes in case.meta["keys"].items():
        kind, _, size, _ = theirs.rsplit("_", 3)
        cfg, model = detector(kind, SIZES[size])
        parameters = dict(model.named_parameters())
        names = {name: str(our_name(name)) for name in shapes}
        report.add_relative(f"{theirs}.names", len(set(names.values()) ^ set(parameters)), 0)
        groups = group(cfg, model)
        for name, shape in shapes.items():
            if names[name] not in parameters:
                continue
            if name.endswith("pos_embed"):  # the class token's position is unused
                shape = [1, shape[1] - 1, shape[2]]
            same = list(parameters[names[name]].shape) == shape
            report.add_relative(f"{theirs}.shape.{name}", 0 if same else 1, 0)
            for what, ours, golden in zip(
                ("decay", "factor"), groups[names[name]], case.meta["optimizer"][theirs][name], strict=True
            ):
                report.add_relative(f"{theirs}.{what}.{name}", ours, golden)
        for what, (numbers, recorded) in schedule(cfg, model, case.meta["training"][theirs]).items():
            tolerance = 0.51 if what == "warm-up" else EXACT  # 187.5 of ViT-H's 138,281 steps are 188 whole ones
            report.add(f"{theirs}.{what}", torch.tensor(numbers).double(), torch.tensor(recorded).double(), tolerance)


def detector(kind: str, size: str) -> tuple[Config, Any]:
    """The config of a detector ("mask_rcnn", "cascade_mask_rcnn") of a size ("", "_large", "_huge"), and the detector.

    Its weights are on the meta device. Cascades have a config for ViT-B only; for other sizes, the parts that depend on
    the size come from the Mask R-CNN config.
    """
    cfg = load_config(own_config(f"mmdet_configs/semaim_{kind}.py"))
    if size:
        sized = load_config(own_config(f"mmdet_configs/semaim_mask_rcnn{size}.py"))
        cfg.model.backbone, cfg.model.neck = sized.model.backbone, sized.model.neck
        cfg.optim_wrapper, cfg.param_scheduler, cfg.train_cfg = (
            sized[key] for key in ("optim_wrapper", "param_scheduler", "train_cfg")
        )
    dense.enter(cfg)
    with torch.device("meta"):
        return cfg, MODELS.build(cfg.model)


def group(cfg: Config, model: nn.Module) -> dict[str, tuple[float, float]]:
    """Name of a parameter -> its weight decay and learning rate factor."""
    wrapper = cfg.optim_wrapper
    groups = group_model(model, cfg.base_lr, wrapper.optimizer.weight_decay, **wrapper.paramwise_cfg)
    return {name: (group["weight_decay"], group["lr"] / cfg.base_lr) for group in groups for name in group["names"]}


def schedule(cfg: Config, model: Any, recorded: dict) -> dict[str, tuple[list, list]]:
    """Name of a setting -> its values here and in the reference."""
    steps, length = cfg.param_scheduler, cfg.train_cfg.max_iters
    milestones = milestones_in_steps(steps.milestones, length)
    windows = [index for index, block in enumerate(model.backbone.blocks) if block.attn.window]
    values = [steps["gamma"] ** k for k in range(len(milestones) + 1)]
    return {
        "steps": ([length], [recorded["max_iter"]]),
        "milestones": (milestones, recorded["milestones"]),
        "values": (values, recorded["values"]),
        "warm-up": ([round(steps["warmup"] * length)], [recorded["warmup_length"] * recorded["max_iter"]]),
        "warm-up's start": ([steps["start_factor"]], [recorded["warmup_factor"]]),
        "drop path": ([cfg.model.backbone.drop_path_rate], [recorded["drop_path_rate"]]),
        "windows": (windows, recorded["window_block_indexes"]),
        "batch": ([cfg.total_batch_size], [recorded["total_batch_size"]]),
    }
