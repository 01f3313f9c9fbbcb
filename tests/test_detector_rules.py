"""Padding, matching, moving boxes and the cascade: each against the plainest code for it."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import flags, tool
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("mmdet", reason="mmdet is not installed: runs after tools/setup.sh --extras all")

import semaim.detection  # noqa: E402, F401  before mmdet

from mmdet.registry import MODELS, TASK_UTILS  # noqa: E402  # isort: skip
from mmdet.structures import DetDataSample  # noqa: E402
from mmdet.structures.bbox import bbox2roi  # noqa: E402
from mmdet.structures.mask import BitmapMasks  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402

from semaim.data.scenes import CLASSES, write_scenes  # noqa: E402
from semaim.engine import dense, testing  # noqa: E402
from semaim.engine.config import load_config, set_data_root  # noqa: E402
from semaim.engine.training import prepare_training, train
from semaim.errors import UserError  # noqa: E402
from semaim.models.vitdet import ViTDet  # noqa: E402

SCENES = "mmdet_configs/semaim_mask_rcnn_scenes.py"
SIDE = 96
SMALL = {
    "model.backbone.embed_dim": 32,
    "model.backbone.num_heads": 2,
    "model.backbone.depth": 2,
    "model.backbone.pretrain_img_size": 32,
    "model.neck.in_channels": 32,
}


def make(cfg, cascade=False):
    """The scenes' detector, small, as Mask R-CNN or as ViTDet's cascade; relative positions are not zero."""
    dense.enter(cfg)
    if cascade:
        ours = load_config("mmdet_configs/semaim_cascade_mask_rcnn.py").model
        cfg.model.type = ours.type
        cfg.model.roi_head.update(type=ours.roi_head.type, stages=ours.roi_head.stages)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    for name, parameter in model.named_parameters():
        if "rel_pos" in name:
            torch.nn.init.normal_(parameter)
    return model


@pytest.fixture(scope="module")
def cascade():
    return make(load_config(SCENES, SMALL), cascade=True)


def batch_of(sizes, objects=0):
    """Noise of (height, width), blue first, each with objects."""
    draw, numbers = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    images, samples = [], []
    for height, width in sizes:
        images.append(torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=numbers))
        sample = DetDataSample(metainfo={"img_shape": (height, width), "ori_shape": (height, width)})
        sample.set_metainfo({"scale_factor": (1.0, 1.0)})
        start = torch.rand(objects, 2, generator=draw) * torch.tensor([width / 2, height / 2])
        boxes = torch.cat([start, start + torch.tensor([width / 3, height / 2])], 1)
        masks = np.zeros((objects, height, width), np.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        labels = torch.randint(0, len(CLASSES), (objects,), generator=draw)
        sample.gt_instances = InstanceData(bboxes=boxes, labels=labels, masks=BitmapMasks(masks, height, width))
        samples.append(sample)
    return {"inputs": images, "data_samples": samples}


# Padding


def by_hand(image):
    """Normalised, then in the corner of a square of zeros."""
    mean, std = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])
    normal = (image.flip(0).double() - mean[:, None, None]) / std[:, None, None]
    return F.pad(normal.float(), (0, SIDE - image.shape[2], 0, SIDE - image.shape[1]))


@pytest.mark.parametrize("training", [False, True])
def test_images_are_padded_to_the_square_in_any_batch(training):
    preprocess = MODELS.build(load_config(SCENES).model.data_preprocessor)
    sizes = [(64, 40), (30, 96), (96, 96), (5, 7)]
    together = preprocess(batch_of(sizes, objects=2), training)
    expected = torch.stack([by_hand(image) for image in batch_of(sizes)["inputs"]])
    assert torch.allclose(together["inputs"], expected, atol=1e-5)
    images = batch_of(sizes, objects=2)
    for index, size in enumerate(sizes):
        one = {name: parts[index : index + 1] for name, parts in images.items()}
        alone = preprocess(one, training)
        assert torch.equal(alone["inputs"][0], together["inputs"][index])
        for sample in (alone["data_samples"][0], together["data_samples"][index]):
            assert sample.img_shape == size and sample.pad_shape == sample.batch_input_shape == (SIDE, SIDE)
            masks = sample.gt_instances.masks
            assert (masks.height, masks.width) == ((SIDE, SIDE) if training else size)
    for size in ((97, 40), (40, 97)):
        with pytest.raises(UserError, match=f"{size[1]} x {size[0]} pixels is larger than the detector's 96 x 96"):
            preprocess(batch_of([(96, 96), size]), training)


@pytest.fixture(scope="module")
def oblong(tmp_path_factory):
    """COCO folders of scenes 64 pixels wide and 40 high, and a sure detector's checkpoint."""
    root = tmp_path_factory.mktemp("oblong")
    write_scenes(root / "scenes", 8, 64, seed=0, val_fraction=0.25)
    coco = root / "scenes/coco"
    for path in coco.rglob("*.jpg"):
        Image.open(path).crop((0, 12, 64, 52)).save(path)
    for path in coco.rglob("*.json"):
        content = json.loads(path.read_text())
        for image in content["images"]:
            image["height"] = 40
        kept = []
        for record in content["annotations"]:
            left, top, width, height = record["bbox"]
            top, bottom = max(top - 12, 0), min(top + height - 12, 40)
            if bottom - top >= 4:
                corners = [left, top, left + width, top, left + width, bottom, left, bottom]
                record.update(bbox=[left, top, width, bottom - top], segmentation=[corners], iscrowd=0)
                kept.append(record | {"area": width * (bottom - top)})
        path.write_text(json.dumps({**content, "annotations": kept}))
    model = make(load_config(SCENES, SMALL))
    with torch.no_grad():
        model.roi_head.bbox_head.fc_cls.weight *= 100
    torch.save({"format": "semaim", "model": model.state_dict(), "classes": list(CLASSES)}, root / "model.pth")
    return coco, root / "model.pth"


def test_predict_pads_an_oblong_image(oblong, tmp_path):
    """Against the same weights on an image padded by hand; without padding its boxes are others."""
    coco, weights = oblong
    path = sorted((coco / "val2017").iterdir())[0]
    done = tool("predict.py", SCENES, weights, path, "--score-thr", 0, "--out", tmp_path, *flags(SMALL))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "predictions.json").read_text())
    assert len(found) > 20

    cfg = load_config(SCENES, SMALL)
    model = make(cfg).eval()
    model.load_state_dict(torch.load(weights, weights_only=True)["model"])
    steps = [step for step in cfg.test_pipeline if not step["type"].endswith("Annotations")]
    from mmengine.registry import TRANSFORMS

    from semaim.engine.dense import build

    data = {"img_path": str(path), "img_id": 0}
    for step in steps:
        data = build(step, TRANSFORMS, "step")(data)
    image = data["inputs"]
    assert tuple(image.shape) == (3, 60, 96)  # 40 x 64 at the detector's scale

    def boxes(pixels):
        with torch.no_grad():
            sample = model.predict(pixels[None], [data["data_samples"].clone()])[0]
        return sample.pred_instances.bboxes, sample.pred_instances.scores

    expected, scores = boxes(by_hand(image))
    given = torch.tensor([one["bbox"] for one in found])
    given[:, 2:] += given[:, :2]
    assert torch.allclose(given, expected, atol=0.01)
    assert torch.allclose(torch.tensor([one["score"] for one in found]), scores, atol=1e-4)
    others, _ = boxes(by_hand(image)[:, :64])  # to a multiple of 32, as mmdet pads in testing
    count = min(len(others), len(expected))
    assert (others[:count] - expected[:count]).abs().max() > 1


def test_validation_and_test_see_squares(oblong, tmp_path, monkeypatch):
    coco, weights = oblong
    seen, forward = [], ViTDet.forward

    def watched(self, images):
        seen.append((self.training, tuple(images.shape)))
        return forward(self, images)

    monkeypatch.setattr(ViTDet, "forward", watched)
    options = {"num_workers": 0, "total_batch_size": 2, "train_cfg.max_iters": 1, "train_cfg.val_interval": 1}
    cfg = load_config(SCENES, {**SMALL, **options})
    set_data_root(cfg, str(coco))
    cfg.work_dir = str(tmp_path / "train")
    train(cfg)
    cfg = load_config(SCENES, {**SMALL, **options})
    set_data_root(cfg, str(coco))
    cfg.work_dir = str(tmp_path / "test")
    testing.test(cfg, str(weights))
    assert seen == [(True, (2, 3, SIDE, SIDE)), *[(False, (1, 3, SIDE, SIDE))] * 4]  # 2 validated on, 2 tested


def test_a_validation_of_larger_images_ends_before_training(oblong, tmp_path):
    coco, weights = oblong
    larger = {"val_dataset.pipeline.1.scale": 128, "val_dataset.pipeline.1.max_size": 128, "total_batch_size": 2}
    cfg = load_config(SCENES, {**SMALL, **larger})
    set_data_root(cfg, str(coco))
    with pytest.raises(UserError, match="128 x 80 pixels is larger than the detector's 96 x 96"):
        prepare_training(cfg, 1)
    with pytest.raises(UserError, match="128 x 80 pixels is larger"):
        testing.prepare_test(cfg, str(weights))


# Matching


def overlap(a, b):
    """Intersection over union of two boxes of whole numbers."""
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    both = max(width, 0) * max(height, 0)
    return Fraction(both, sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - both)


def match(anchors, objects):
    """detectron2's matcher, written out: each anchor's object, -1 for background, -2 for ignored."""
    found = []
    for anchor in anchors:
        overlaps = [overlap(anchor, other) for other in objects]
        best = max(overlaps, default=Fraction(0))
        claimed = any(
            mine > 0 and mine == max(overlap(one, other) for one in anchors)
            for mine, other in zip(overlaps, objects, strict=True)
        )
        if claimed or best >= Fraction(7, 10):
            found.append(overlaps.index(best))
        else:
            found.append(-1 if best < Fraction(3, 10) else -2)
    return found


corner = st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(1, 8), st.integers(1, 8))
box = corner.map(lambda c: (c[0], c[1], c[0] + c[2], c[1] + c[3]))


@given(st.lists(box, min_size=1, max_size=12), st.lists(box, max_size=5))
def test_anchors_are_matched_as_written_out(anchors, objects):
    assigner = TASK_UTILS.build(load_config(SCENES).model.train_cfg.rpn.assigner)
    labels = torch.arange(len(objects)) + 3
    boxes = torch.tensor(objects, dtype=torch.float32).view(-1, 4)
    result = assigner.assign(
        InstanceData(priors=torch.tensor(anchors, dtype=torch.float32)), InstanceData(bboxes=boxes, labels=labels)
    )
    expected = match(anchors, objects)
    assert [index + 1 if index >= -1 else -1 for index in expected] == result.gt_inds.tolist()
    assert [index + 3 if index >= 0 else -1 for index in expected] == result.labels.tolist()
    for other in objects:  # each has a positive among those that overlap it most, if any does
        overlaps = [overlap(anchor, other) for anchor in anchors]
        best = [index for index, share in enumerate(overlaps) if share == max(overlaps) > 0]
        assert all(expected[index] >= 0 for index in best)


def test_an_image_without_objects_counts_its_256_anchors(cascade):
    """With logits of zero every sampled anchor's loss is log 2, and so is their mean."""
    head, sizes = cascade.rpn_head, [48, 24, 12, 6, 3]
    logits = [torch.zeros(3, 3, side, side) for side in sizes]
    deltas = [torch.zeros(3, 12, side, side) for side in sizes]
    batch = cascade.data_preprocessor(batch_of([(40, 96)] * 3, objects=0), True)
    metas = [sample.metainfo for sample in batch["data_samples"]]
    losses = head.loss_by_feat(logits, deltas, [sample.gt_instances for sample in batch["data_samples"]], metas)
    assert sum(losses["loss_rpn_cls"]).item() == pytest.approx(math.log(2), rel=1e-6)
    # Anchors in the padding are sampled like the others.
    _, valid = head.get_anchors([(side, side) for side in sizes], metas, "cpu")
    assert all(flags.all() for image in valid for flags in image)


def test_two_objects_of_one_box_are_one_proposal_s_target(cascade):
    """An object's own box is matched like any other: with the first of the two."""
    batch = batch_of([(96, 96)], objects=2)
    objects = batch["data_samples"][0].gt_instances
    objects.bboxes[1], objects.labels = objects.bboxes[0], torch.tensor([4, 7])
    proposals = InstanceData(bboxes=torch.tensor([[1.0, 1.0, 9.0, 9.0]]))
    both = semaim.detection.heads.with_objects([proposals], batch["data_samples"])[0]
    assert torch.equal(both.bboxes, torch.cat([proposals.bboxes, objects.bboxes]))
    sampled = cascade.roi_head.sample(both, objects)
    assert sampled.pos_inds.tolist() == [1, 2] and sampled.pos_gt_labels.tolist() == [4, 4]


# Boxes


def test_boxes_are_moved_in_fp32_and_may_shrink_to_nothing():
    coder = TASK_UTILS.build({"type": "BoxCoder", "stds": [1 / 30, 1 / 30, 1 / 15, 1 / 15]})
    draw = torch.Generator().manual_seed(0)
    start = torch.rand(50, 2, generator=draw) * 600
    boxes = torch.cat([start, start + torch.rand(50, 2, generator=draw) * 400 + 1], 1)
    deltas = (40 * torch.randn(50, 8, generator=draw)).bfloat16()
    found = coder.decode(boxes, deltas, max_shape=(700, 900))
    assert found.dtype == torch.float32
    for (left, top, right, bottom), row, ours in zip(boxes.tolist(), deltas.tolist(), found.tolist(), strict=True):
        for c in (0, 4):
            dx, dy, dw, dh = row[c] / 30, row[c + 1] / 30, row[c + 2] / 15, row[c + 3] / 15
            width, height = right - left, bottom - top
            x, y = left + width / 2 + dx * width, top + height / 2 + dy * height
            limit = math.log(1000 / 16)
            width, height = width * math.exp(min(dw, limit)), height * math.exp(min(dh, limit))
            expected = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
            expected = [min(max(value, 0), side) for value, side in zip(expected, (900, 700) * 2, strict=True)]
            assert ours[c : c + 4] == pytest.approx(expected, abs=2e-3)
    assert deltas.min() / 15 < -math.log(1000 / 16)  # mmdet would stop there
    targets = coder.encode(boxes, boxes.flip(0))
    assert torch.allclose(coder.decode(boxes, targets), boxes.flip(0), atol=1e-2)


# Cascade


@pytest.mark.parametrize("reduced", [False, True])
def test_the_cascade_trains_on_one_mask_head(cascade, reduced):
    """A step on two images, one without objects: every weight learns, losses have equal weights."""
    batch = batch_of([(96, 60), (50, 96)], objects=3)
    none = batch["data_samples"][1].gt_instances
    batch["data_samples"][1].gt_instances = none[:0]
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
        losses = cascade.train()(**cascade.data_preprocessor(batch, True), mode="loss")
    names = {f"s{stage}.loss_{what}" for stage in range(3) for what in ("cls", "bbox")}
    assert {name for name in losses if "loss" in name} == names | {"loss_rpn_cls", "loss_rpn_bbox", "loss_mask"}
    assert not isinstance(cascade.roi_head.mask_head, torch.nn.ModuleList) and len(cascade.roi_head.bbox_head) == 3
    loss, _ = cascade.parse_losses(losses)
    total = sum(sum(value) if isinstance(value, list) else value for name, value in losses.items() if "loss" in name)
    assert loss.item() == pytest.approx(total.item())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in cascade.parameters())
    cascade.zero_grad()


def test_each_stage_passes_a_third_of_its_gradient(cascade):
    roi, draw = cascade.roi_head, torch.Generator().manual_seed(0)
    levels = [torch.randn(1, 64, side, side, generator=draw).requires_grad_() for side in (48, 24, 12, 6)]
    rois = torch.tensor([[0, 5.0, 5.0, 60.0, 40.0], [0, 1.0, 2.0, 20.0, 30.0]])
    for stage, head in enumerate(roi.bbox_head):
        weights = list(head.parameters())
        ours = torch.autograd.grad(sum(part.square().sum() for part in roi.run(stage, levels, rois)), levels + weights)
        whole = sum(part.square().sum() for part in head(roi.bbox_roi_extractor(levels, rois)))
        plain = torch.autograd.grad(whole, levels + weights)
        assert all(torch.allclose(a * 3, b, rtol=1e-4) for a, b in zip(ours[:4], plain[:4], strict=True))
        assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(ours[4:], plain[4:], strict=True))
        assert plain[0].abs().sum() > 0


def test_scores_are_the_mean_of_the_stages_softmaxes(cascade):
    """Every proposal goes through all stages; then a softmax each, and their mean."""
    roi, draw = cascade.roi_head.eval(), torch.Generator().manual_seed(0)
    start = 60 * torch.rand(2, 30, 2, generator=draw)
    proposals = torch.cat([start, start + 1 + 30 * torch.rand(2, 30, 2, generator=draw)], -1)
    metas = [{"img_shape": (96, 70), "scale_factor": (1.0, 1.0)}, {"img_shape": (60, 96), "scale_factor": (1.0, 1.0)}]
    saved = {name: tensor.clone() for name, tensor in roi.state_dict().items()}
    with torch.no_grad():
        for head in roi.bbox_head:
            head.fc_cls.weight *= 300
            head.fc_reg.weight *= 20
        levels = [torch.randn(2, 64, side, side, generator=draw) for side in (48, 24, 12, 6)]
        found = roi.predict_bbox(levels, metas, [InstanceData(bboxes=part) for part in proposals], roi.test_cfg)
        boxes, scores = proposals, 0
        for head in roi.bbox_head:
            rois = bbox2roi(list(boxes))
            logits, deltas = head(roi.bbox_roi_extractor(levels, rois))
            scores = scores + logits.softmax(-1).view(2, 30, -1) / 3
            parts = zip(boxes, deltas.view(2, 30, 4), metas, strict=True)
            boxes = [head.bbox_coder.decode(part, moves, meta["img_shape"]) for part, moves, meta in parts]
    roi.load_state_dict(saved)
    for image, mine in enumerate(found):
        assert len(mine) > 5
        for place, label, score in zip(mine.bboxes, mine.labels, mine.scores, strict=True):
            row = (boxes[image] - place).abs().sum(1).argmin()
            assert torch.allclose(boxes[image][row], place, atol=1e-4)
            assert scores[image][row, label].item() == pytest.approx(score.item(), abs=1e-5)
