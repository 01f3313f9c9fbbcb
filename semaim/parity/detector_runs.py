"""Whole detectors against detectron2's: from photos to detections and masks, and from objects to losses and gradients.

Our detectors are those of `mmdet_configs` with a case's sizes, run by the calls that test and train them; hooks keep
the intermediate results. Everything except sizes (matching, deltas, losses) is from the configs.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from semaim.engine.config import load_config
from semaim.engine.dense import build, enter
from semaim.parity.cases import Case, CaseReport
from semaim.places import own_config

CONFIGS = {"mask_rcnn": "semaim_mask_rcnn.py", "cascade_mask_rcnn": "semaim_cascade_mask_rcnn.py"}
Detector = Any  #: mmdet's, which has no types
TIMES = ("train", "test")
LEVELS = ("p2", "p3", "p4", "p5", "p6")
MASK_PIXELS = 5  #: pixels of a mask that may differ
NORM = 1e-5  #: relative, of tensors in fp32
LOSS = 1e-5  #: relative, in fp64 too: detectron2 keeps its boxes in fp32 there
#: Relative, of norms in fp64. The boxes are in fp32 there too: 3e-8 on an AMD EPYC, 4e-7 on an Intel Xeon.
GRADIENT = 1e-6


def build_detector(case: Case) -> Detector:
    """The config's detector with a case's sizes and weights."""
    from semaim.detection.detectron2_names import to_ours

    theirs = case.meta["config"]
    net, rpn, roi = theirs["backbone"], theirs["rpn"], theirs["roi_heads"]
    channels, count = net["out_channels"], {"num_classes": roi["num_classes"]}
    kept = {when: {"nms_pre": rpn["pre_nms_topk"][when], "max_per_img": rpn["post_nms_topk"][when]} for when in TIMES}
    changes = {
        "data_preprocessor": {"side": net["square_pad"]},
        "backbone": {name: net[name] for name in ("img_size", "pretrain_img_size", "patch_size", "window_size")}
        | {name: net[name] for name in ("embed_dim", "depth", "num_heads", "mlp_ratio", "drop_path_rate")}
        | {"global_blocks": [i for i in range(net["depth"]) if i not in net["window_block_indexes"]]},
        "neck": {"in_channels": net["embed_dim"], "out_channels": channels},
        "rpn_head": {"in_channels": channels, "feat_channels": channels},
        "roi_head.bbox_roi_extractor": {"out_channels": channels},
        "roi_head.mask_roi_extractor": {"out_channels": channels},
        "roi_head.bbox_head": {"in_channels": channels, "conv_out_channels": roi["conv_dim"], **count}
        | {"fc_out_channels": roi["fc_dim"]},
        "roi_head.mask_head": {"in_channels": channels, "conv_out_channels": roi["conv_dim"], **count},
        "train_cfg.rpn_proposal": kept["train"],
        "test_cfg.rpn": kept["test"],
        "test_cfg.rcnn": {"max_per_img": roi["test_topk_per_image"]},
    }
    options = {f"model.{part}.{key}": value for part, keys in changes.items() for key, value in keys.items()}
    cfg = load_config(own_config(f"mmdet_configs/{CONFIGS[theirs['detector']]}"), options)
    enter(cfg)
    model = build(cfg.model, MODELS, "model")
    model.load_state_dict(to_ours(case.parameters()))
    return model


def stages(model: Detector) -> dict[str, Any]:
    """The box heads by their recorded names."""
    heads = model.roi_head.bbox_head
    return {f"stage{i}": head for i, head in enumerate(heads)} if isinstance(heads, nn.ModuleList) else {"box": heads}


def watch(model: Detector) -> dict[str, Any]:
    """A dict that every run of the model fills: outputs of modules, and copies of the results of methods."""
    seen: dict[str, Any] = {}
    roi = model.roi_head
    parts = {"maps": model.backbone, "levels": model.neck, "rpn": model.rpn_head, "masks": roi.mask_head}
    parts |= stages(model) | {"pooled": roi.bbox_roi_extractor}

    def hook(name: str) -> Callable:
        def kept(module: nn.Module, args: tuple, out: Any) -> None:  # a hook's result would replace the module's
            seen.setdefault(name, out)  # only the first: the stages of a cascade share the pooling

        return kept

    for name, module in parts.items():
        module.register_forward_hook(hook(name))

    def keep(name: str, owner: Any, method: str, what: Callable = lambda args, out: out) -> None:
        called = getattr(owner, method)

        def wrapped(*args, **kwargs):
            out = called(*args, **kwargs)
            seen.setdefault(name, []).append(copy.deepcopy(what(args, out)))
            return out

        setattr(owner, method, wrapped)

    keep("proposals", model.rpn_head, "predict_by_feat")
    keep("detections", roi, "predict_bbox")
    if hasattr(roi, "move"):
        keep("moved", roi, "move")
    if model.training:
        keep("matched", model.rpn_head.assigner, "assign")
        keep("sampled", model.rpn_head.sampler, "sample")
        keep("sampled boxes", roi.bbox_sampler, "sample")
        keep("mask targets", roi.mask_head, "get_targets")
        for name, head in stages(model).items():  # boxes, labels and deltas, without their weights
            keep(f"{name} targets", head, "loss", lambda args, out: (args[2], args[3], args[5]))
    return seen


def batch_of(case: Case, chosen: list[int]) -> dict[str, list]:
    """Photos of a case as a pipeline passes them to the model: BGR, uint8, with sizes and objects."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    samples = []
    for index in chosen:
        height, width = case.scalars["image_sizes"][index]
        rows, columns = case.scalars.get("output_sizes", case.scalars["image_sizes"])[index]
        sample = DetDataSample(
            metainfo={"img_shape": (height, width), "ori_shape": (rows, columns)}
            | {"scale_factor": (width / columns, height / rows)}
        )
        if "objects" in case.scalars:
            if f"{index}.gt_boxes" in case.tensors:
                objects = {name: case.tensors[f"{index}.gt_{name}"] for name in ("boxes", "classes", "masks")}
            else:
                objects = {"boxes": torch.zeros(0, 4), "classes": torch.zeros(0, dtype=torch.long)}
                objects["masks"] = torch.zeros(0, height, width, dtype=torch.uint8)
            sample.gt_instances = InstanceData(
                bboxes=objects["boxes"],
                labels=objects["classes"],
                masks=BitmapMasks(objects["masks"].numpy(), height, width),
            )
        samples.append(sample)
    return {"inputs": [case.tensors[f"{index}.image"].flip(0) for index in chosen], "data_samples": samples}


# Testing


def check_test(case: Case, report: CaseReport) -> None:
    """Every recorded step from the photos to the masks, for one batch of all photos, then for each photo alone."""
    model = build_detector(case).eval()
    seen = watch(model)
    every = list(range(len(case.scalars["image_sizes"])))
    batch = test(model, seen, case, every)
    for name in case.tensors:
        if not name.startswith("param.") and not name.endswith(".image"):
            compare(case, report, name, batch[name], every)
    for name, recorded in case.scalars.get("norms_of_tensors_left_out", {}).items():
        report.add_relative(f"norm of {name}", batch[name].double().norm().item(), recorded["l2_norm_fp64"], NORM)
    for index in every:
        for name, ours in test(model, seen, case, [index]).items():
            if name in case.tensors and name not in ("anchors", "padded_input", "box_pooled_first4"):
                compare(case, report, name, ours, [index])


def test(model: Detector, seen: dict, case: Case, chosen: list[int]) -> dict[str, Tensor]:
    """Run on some of a case's photos: recorded name -> our result."""
    seen.clear()
    batch = batch_of(case, chosen)
    padded = model.data_preprocessor(copy.deepcopy(batch), False)["inputs"]
    with torch.no_grad():
        final = model.test_step(batch)
    sides = [level.shape[-2:] for level in seen["levels"]]
    found = {
        "anchors": torch.cat(model.rpn_head.prior_generator.grid_priors(sides, device="cpu")),
        "padded_input": padded[1 % len(chosen)][None],  # image 1 of a batch of all
        "box_pooled_first4": seen["pooled"][:4],
        **maps_of(seen),
        **rows_of(model, seen),
    }
    start = 0
    for index, sample, proposals, boxes in zip(chosen, final, seen["proposals"][0], seen["detections"][0], strict=True):
        rows = torch.arange(len(boxes)), boxes.labels
        masks = sample.pred_instances.masks
        mine = {
            "proposal_boxes": proposals.bboxes,
            "proposal_logits": proposals.scores,
            "boxes": boxes.bboxes,
            "scores": boxes.scores,
            "classes": boxes.labels,
            "mask_probs": seen["masks"][start : start + len(boxes)][rows].sigmoid(),
            "final_boxes": sample.pred_instances.bboxes,
            "final_masks_first3": masks[:3],
            "final_mask_area": masks.flatten(1).sum(1),
        }
        start += len(boxes)
        for stage, moved in enumerate(seen.get("moved", [])[:-1]):  # the last stage's boxes are the result
            mine[f"stage{stage + 1}.boxes"] = moved[chosen.index(index)]
        found |= {f"{index}.{name}": tensor for name, tensor in mine.items()}
    return found


def maps_of(seen: dict) -> dict[str, Tensor]:
    """Maps of the encoder, the pyramid and the proposal head."""
    named = {"last_feat": seen["maps"], **dict(zip(LEVELS, seen["levels"], strict=True))}
    for name, logits, deltas in zip(LEVELS, *seen["rpn"], strict=True):
        named |= {f"rpn.logits.{name}": logits, f"rpn.deltas.{name}": deltas}
    return named


def rows_of(model: Detector, seen: dict) -> dict[str, Tensor]:
    """Logits and deltas of the box heads, the rows of all images concatenated."""
    named = {}
    for name in stages(model):
        named[f"{name}.cls_logits"], named[f"{name}.deltas"] = seen[name]
    return named


def compare(case: Case, report: CaseReport, name: str, ours: Tensor, chosen: list[int]) -> None:
    """Compare the results of some of the photos; `MASK_PIXELS` pixels of a mask may differ."""
    golden, counts = case.tensors[name], case.scalars["image_sizes"]
    if name in ("last_feat", *LEVELS) or name.startswith("rpn."):
        golden = golden[chosen]
    elif name.endswith((".cls_logits", ".deltas")):
        counts = [len(case.tensors[f"{index}.proposal_boxes"]) for index in range(len(counts))]
        golden = torch.cat([golden.split(counts)[index] for index in chosen])
    shown = name if len(chosen) == len(counts) else f"{name}, alone"
    if "final_masks" in name and ours.shape == golden.shape:
        ours, golden = (ours != golden.bool()).flatten(1).sum(1), torch.zeros(len(golden))
    report.add(shown, ours, golden, MASK_PIXELS if "final_mask" in name else case.tolerance(name))


# Training


def check_train(case: Case, report: CaseReport) -> None:
    """Matching, samples, targets, losses in fp32 and fp64, gradients of their sum, and the norms of all gradients."""
    from semaim.detection.detectron2_names import our_name, to_ours

    model = build_detector(case).train()
    seen = watch(model)
    for sampler in (model.rpn_head.sampler, model.roi_head.bbox_sampler):
        sampler.random_choice = every_nth
    with torch.no_grad():
        losses = train(model, case)
    found = {**maps_of(seen), **rows_of(model, seen), **targets_of(model, seen)}
    for index, proposals in enumerate(seen["proposals"][0]):
        found |= {f"{index}.proposal_boxes": proposals.bboxes, f"{index}.proposal_logits": proposals.scores}
    found["box_pooled_first4"] = seen["pooled"][:4]
    found["rpn.match_label"] = torch.stack([result.gt_inds.clamp(max=1) for result in seen["matched"]])
    found["rpn.sampled_label"] = torch.full_like(found["rpn.match_label"], -1)
    for labels, result in zip(found["rpn.sampled_label"], seen["sampled"], strict=True):
        labels[result.neg_inds], labels[result.pos_inds] = 0, 1
    # The matched object matters only for positive anchors.
    positive = case.tensors["rpn.match_label"] == 1
    indices = torch.stack([result.gt_inds - 1 for result in seen["matched"]])
    report.add("rpn.match_index", indices[positive], case.tensors["rpn.match_index"][positive], None)
    for name, ours in found.items():
        if name in case.tensors:
            golden = case.tensors[name]
            if name.endswith("train_gt_boxes"):  # background has none
                front = found[name.replace("gt_boxes", "classes")] < case.meta["config"]["roi_heads"]["num_classes"]
                ours, golden = ours[front], golden[front]
            report.add(name, ours, golden, case.tolerance(name))
    compare_masks(case, report, model, seen)
    for name, value in losses.items():
        report.add_relative(name, value.item(), case.scalars["losses"][name], LOSS)

    # In fp64: in fp32 some ReLUs near zero switch.
    losses = train(model.double(), case)
    torch.stack([loss.sum() for loss in losses.values()]).sum().backward()
    for name, value in losses.items():
        report.add_relative(f"{name}_fp64", value.item(), case.scalars["losses_fp64"][name], LOSS)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    recorded = {name: tensor for name, tensor in case.tensors.items() if name.startswith("grad.")}
    for name, golden in recorded.items():
        for own, converted in to_ours({name.removeprefix("grad."): golden}).items():
            report.add(name, gradients[own], converted, case.tolerance(name))
    for name, norm in case.scalars["grad_l2_norm_fp64"].items():
        report.add_relative(f"norm of grad.{name}", gradients.pop(our_name(name)).norm().item(), norm, GRADIENT)
    report.add("gradients that are not recorded", torch.tensor(len(gradients)), torch.tensor(0), None)


def targets_of(model: Detector, seen: dict) -> dict[str, Tensor]:
    """Per image and stage: boxes, classes, and the objects' boxes that the deltas of the foreground lead to."""
    found = {}
    for name, head in stages(model).items():
        rois, labels, deltas = seen[f"{name} targets"][0]
        for index in range(len(seen["matched"])):
            rows = rois[:, 0] == index
            boxes = rois[rows, 1:]
            found[f"{index}.{name}.train_boxes"], found[f"{index}.{name}.train_classes"] = boxes, labels[rows]
            found[f"{index}.{name}.train_gt_boxes"] = head.bbox_coder.decode(boxes, deltas[rows])
    return found


def every_nth(gallery: Tensor, count: int) -> Tensor:
    """The deterministic draw of the records: of n candidates number i * n // count, i = 0 .. count - 1."""
    return gallery[torch.arange(count) * len(gallery) // count]


def train(model: Detector, case: Case) -> dict[str, Tensor]:
    """Losses of a batch of all photos, under their recorded names."""
    batch = model.data_preprocessor(batch_of(case, list(range(len(case.scalars["image_sizes"])))), True)
    batch["inputs"] = batch["inputs"].to(next(model.parameters()).dtype)
    losses = {name: value for name, value in model(**batch, mode="loss").items() if "loss" in name}
    losses = {name: sum(value) if isinstance(value, list) else value for name, value in losses.items()}
    return {recorded_name(name): value for name, value in losses.items()}


def recorded_name(name: str) -> str:
    """mmdet's name of a loss -> detectron2's: `rpn_bbox` is `rpn_loc`, `s0.loss_bbox` is `loss_box_reg_stage0`."""
    stage, _, name = name.rpartition(".")
    name = name.replace("rpn_bbox", "rpn_loc").replace("loss_bbox", "loss_box_reg")
    return f"{name}_stage{stage[1:]}" if stage else name


def compare_masks(case: Case, report: CaseReport, model: Detector, seen: dict) -> None:
    """Compare our mask targets, cut from bitmaps, and those that our heads cut from polygons as detectron2 does."""
    from mmdet.structures.mask import PolygonMasks
    from mmengine.structures import InstanceData

    ours, head = seen["mask targets"][0], model.roi_head.mask_head
    report.add("mask_targets", ours, case.tensors["mask_targets"], None)
    objects = [
        InstanceData(masks=PolygonMasks([[np.array(polygon)] for polygon in polygons], height, width))
        for polygons, (height, width) in zip(case.scalars["polygons"], case.scalars["image_sizes"], strict=True)
    ]
    of_polygons = head.get_targets(seen["sampled boxes"], objects, model.roi_head.train_cfg)
    report.add("mask_targets_polygon", of_polygons, case.tensors["mask_targets_polygon"], None)
    bitmap, polygon = case.scalars["losses"]["loss_mask"], case.scalars["loss_mask_polygon"]
    share = (ours != of_polygons).double().mean()
    report.deviations.append(
        f"mask targets are cut from bitmaps, in detectron2's recipe from polygons: {share:.1%} of their pixels differ,"
        f" and the loss is {bitmap:.4f} in place of {polygon:.4f}"
    )
