"""Detectors are trained as detectron2's ViTDet: resizing, crops, weight decay, learning rates, start, ViT-H."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("mmdet", reason="mmdet is not installed: runs after tools/setup.sh --extras all")

from mmengine.registry import MODELS, TRANSFORMS  # noqa: E402
from PIL import Image  # noqa: E402

from semaim import checkpoints  # noqa: E402
from semaim.checkpoints.consumers import NEW_IN_BACKBONES  # noqa: E402
from semaim.checkpoints.files import write_checkpoint  # noqa: E402
from semaim.engine import dense  # noqa: E402
from semaim.engine.config import load_config  # noqa: E402
from semaim.engine.optim import group_model, group_parameters  # noqa: E402
from semaim.errors import UserError  # noqa: E402
from semaim.models.segvit import SegmentationViT  # noqa: E402
from semaim.models.vit import VisionTransformer  # noqa: E402
from semaim.models.vitdet import ViTDet  # noqa: E402
from semaim.parity import detector_recipe  # noqa: E402
from semaim.parity.cases import Case, CaseReport  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "mmdet_configs").glob("*.py"))


def failed(report):
    """Names of the comparisons that do not hold."""
    return [check.name for check in report.checks if not check.passed]


def test_resizing_is_detectron2s(shared):
    """Every photo, mask and box at every scale, and 61 sizes."""
    case, report = Case(shared / "golden/detector/resize.json"), CaseReport("detector/resize")
    detector_recipe.check_resize(case, report)
    assert not failed(report)
    compared = {check.name for check in report.checks}
    assert {name for name in case.tensors if name.count(".") > 1} <= compared
    assert sum(name.startswith("size.") for name in compared) == 54 + 7


def test_weight_decay_and_learning_rate_of_every_parameter_are_detectron2s(shared):
    """B, L and H, Mask R-CNN and Cascade: 2,474 parameters."""
    case, report = Case(shared / "golden/detector/keys.json"), CaseReport("detector/keys")
    detector_recipe.check_keys(case, report)
    assert not failed(report)
    kinds = Counter(check.name.split(".")[1] for check in report.checks)
    assert kinds["decay"] == kinds["factor"] == kinds["shape"] == 245 + 281 + 413 + 449 + 525 + 561


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_resizes_by_pillow(path):
    """A striped photo at a quarter of its size is grey as Pillow makes it; four-pixel filters leave stripes."""
    cfg = load_config(path)
    cfg.pop("own_data", None)  # of data that only a run names
    dense.enter(cfg)
    stripes = np.zeros((64, 96, 3), np.uint8)
    stripes[:, ::3] = 255
    for steps in (cfg.train_dataset.pipeline, cfg.test_pipeline, cfg.val_dataset.pipeline):
        step = next(dict(step) for step in steps if step["type"].startswith("Resize"))
        step |= {"scale": 24, "max_size": 24} if "max_size" in step else {"scale": (24, 24), "ratio_range": (1.0, 1.0)}
        found = TRANSFORMS.build(step)({"img": stripes.copy()})["img"]
        assert np.array_equal(found, np.asarray(Image.fromarray(stripes).resize((24, 16), Image.Resampling.BILINEAR)))
        assert found.std() < 10


def test_a_crop_is_placed_by_one_number_and_its_boxes_are_those_of_the_masks():
    """A photo too large on both axes is cut along its diagonal; one that fits stays whole."""
    dense.enter(load_config(CONFIGS[0]))
    from mmdet.structures.bbox import HorizontalBoxes  # needs our operators
    from mmdet.structures.mask import BitmapMasks

    crop = TRANSFORMS.build({"type": "FixedSizeCrop", "crop_size": (40, 40)})

    def cut(height, width):
        mask = np.zeros((2, height, width), np.uint8)
        mask[0, 5:30, 5:30], mask[1, height - 2 :, width - 2 :] = 1, 1
        boxes = HorizontalBoxes(torch.tensor([[0.0, 0, 35, 35], [width - 2, height - 2, width, height]]))
        image = np.stack(np.mgrid[:height, :width], axis=-1)
        data = {"img": image, "gt_bboxes": boxes, "gt_masks": BitmapMasks(mask, height, width)}
        return crop({**data, "gt_bboxes_labels": np.array([1, 2]), "gt_ignore_flags": np.zeros(2, bool)})

    np.random.seed(0)
    offsets = []
    for _ in range(200):
        found = cut(60, 140)
        y, x = found["img"][0, 0]
        assert found["img"].shape == (40, 40, 2) and abs(x / 100 - y / 20) <= 0.03
        offsets.append(x)
        for box, mask in zip(found["gt_bboxes"].tensor.tolist(), found["gt_masks"].masks, strict=True):
            rows, columns = np.nonzero(mask)
            edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else [0] * 4
            assert box == edges
    assert min(offsets) < 5 and max(offsets) > 95 and 40 < np.mean(offsets) < 60
    found = cut(30, 40)
    assert found["img"].shape[:2] == (30, 40) and len(found["gt_bboxes"]) == 2


def test_layers_start_with_detectron2s_deviations():
    """By detectron2's rules: c2_msra sqrt(2 / (9 x 256)), c2_xavier 1 / sqrt(inputs), normal 0.01 and 0.001."""
    cfg = load_config(ROOT / "mmdet_configs/semaim_mask_rcnn.py", {"model.backbone.depth": 1})
    cfg.model.backbone.global_blocks = (0,)
    dense.enter(cfg)
    torch.manual_seed(0)
    neck_and_heads = MODELS.build({**cfg.model, "backbone": {**cfg.model.backbone, "size": "tiny"}})
    neck_and_heads.init_weights()
    weights = dict(neck_and_heads.named_parameters())
    inputs, default = 256 * 7 * 7, 1 / math.sqrt(3)  # torch's own: uniform within 1 / sqrt(inputs)
    expected = {
        "roi_head.mask_head.conv_logits.weight": 0.001,
        "roi_head.mask_head.convs.3.conv.weight": math.sqrt(2 / (9 * 256)),
        "roi_head.mask_head.upsample.weight": math.sqrt(2 / (4 * 256)),
        "roi_head.bbox_head.shared_fcs.0.weight": 1 / math.sqrt(inputs),
        "roi_head.bbox_head.shared_convs.0.conv.weight": math.sqrt(2 / (9 * 256)),
        "roi_head.bbox_head.fc_cls.weight": 0.01,
        "roi_head.bbox_head.fc_reg.weight": 0.001,
        "rpn_head.rpn_conv.1.conv.weight": 0.01,
        "rpn_head.rpn_cls.weight": 0.01,
        "rpn_head.rpn_reg.weight": 0.01,
        "neck.levels.p3.lateral.weight": default / math.sqrt(384),
        "neck.levels.p2.output.weight": default / math.sqrt(9 * 256),
        "neck.levels.p3.resample.0.weight": default / math.sqrt(4 * 384),
    }
    for name, std in expected.items():
        # The error of a standard deviation of n numbers is below 1 / sqrt(2 n) of it.
        allowed = 4 / math.sqrt(2 * weights[name].numel())
        assert weights[name].std().item() == pytest.approx(std, rel=allowed), name
        assert abs(weights[name].mean().item()) < 4 * std / math.sqrt(weights[name].numel()), name
    fc = weights["roi_head.bbox_head.shared_fcs.0.weight"]
    assert fc.abs().max().item() == pytest.approx(math.sqrt(3 / inputs), rel=1e-3)  # uniform, not normal
    for name in ("roi_head.mask_head.conv_logits", "roi_head.bbox_head.shared_fcs.0", "roi_head.bbox_head.fc_cls"):
        assert not weights[f"{name}.bias"].any()


def test_norms_are_told_by_their_class():
    """PyTorch's own, whatever their names; not the one over the channels of maps."""
    from timm.layers import LayerNorm2d

    from semaim.detection.heads import PreciseSyncBN

    parts = {"a": torch.nn.LayerNorm(4), "b": LayerNorm2d(4), "c": PreciseSyncBN(4), "norm": torch.nn.Linear(4, 4)}
    model = torch.nn.ModuleDict({**parts, "d": torch.nn.GroupNorm(2, 4)})

    def decayed(**rules):
        groups = group_model(model, 1.0, 0.1, **rules)
        return sorted(name for group in groups if group["weight_decay"] for name in group["names"])

    rest = ["b.bias", "b.weight", "norm.bias", "norm.weight"]
    assert decayed(decay="all but norms") == rest
    assert decayed(decay="all but norms", undecayed=("bias",)) == ["b.weight", "norm.weight"]
    assert decayed() == decayed(decay="matrices") == ["norm.weight"]
    assert decayed(decay="all") == sorted(name for name, _ in model.named_parameters())
    with pytest.raises(UserError, match="paramwise_cfg.decay is 'norms'"):
        group_parameters(model.named_parameters(), 1.0, 0.1, decay="norms")


@pytest.mark.parametrize("kind", [ViTDet, SegmentationViT])
def test_patches_of_14_pixels_are_resampled_to_16_and_reported(kind, tmp_path):
    """MAE's ViT-H on 224 pixels has 16 x 16 patches of 14; the dense tasks' 14 x 14 of 16."""
    sizes = {"embed_dim": 64, "depth": 2, "num_heads": 1}
    torch.manual_seed(0)
    given = VisionTransformer(img_size=224, patch_size=14, **sizes)
    path = tmp_path / "mae_h14.pth"
    write_checkpoint({"model": given.state_dict()}, path)
    model = kind(img_size=224, **sizes)
    report = checkpoints.load(model, path, NEW_IN_BACKBONES)
    expected = F.interpolate(given.patch_embed.proj.weight, (16, 16), mode="bicubic", align_corners=False)
    assert torch.equal(model.patch_embed.proj.weight, expected) and not report.missing
    assert "patch_embed.proj.weight (64, 3, 14, 14) -> (64, 3, 16, 16)" in str(report)
    assert model.pos_embed.shape[1] in (196, 197) and torch.equal(
        model.blocks[1].mlp.fc1.weight, given.blocks[1].mlp.fc1.weight
    )
    # A plain slope is the same picture for both: so is what the projection makes of it, but for the number of pixels.
    flat = torch.ones(1, 3, 224, 224)
    with torch.no_grad():
        ours, theirs = model.patch_embed(flat).flatten(0, -2)[0], given.patch_embed(flat).flatten(0, -2)[0]
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.9
    with pytest.raises(UserError, match="patch 14; the model a .*patch 16"):
        checkpoints.load(VisionTransformer(img_size=224, **sizes), path)
