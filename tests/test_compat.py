"""mmcv's operators over torchvision's: against loops over the definitions, and in edge cases."""

import importlib
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("mmcv", reason="mmcv is not installed: runs after tools/setup.sh --extras all")

from semaim import compat  # noqa: E402

compat.install()
ext = importlib.import_module("mmcv._ext")
if Path(ext.__file__) != compat.SOURCE:
    pytest.skip("a compiled mmcv takes our place: runs in the environment of tools/setup.sh", allow_module_level=True)

import mmcv.ops  # noqa: E402

HALF = [torch.float16, torch.bfloat16]


def overlaps(a, b, tenths, offset):
    """Whether the overlap of two boxes of integers exceeds tenths / 10: no rounding anywhere."""
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]) + offset)
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]) + offset)
    area = sum((x2 - x1 + offset) * (y2 - y1 + offset) for x1, y1, x2, y2 in (a, b))
    return 10 * width * height > tenths * (area - width * height)


def nms_loop(boxes, scores, tenths, offset):
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if not any(overlaps(boxes[i], boxes[k], tenths, offset) for k in kept):
            kept.append(i)
    return kept


def draw_boxes(draw, count, size=6):
    """Corners on a coarse grid, so that overlaps of exactly 1/10, 3/5... and boxes without area are frequent."""
    corners = [[sorted(draw.choices(range(size), k=2)) for _ in "xy"] for _ in range(count)]
    return [[x[0], y[0], x[1], y[1]] for x, y in corners]


def tensor(boxes):
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


# nms


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("origin, step", [(0, 1), (-4, 1), (2**24, 2)], ids=["zero", "negative", "far"])
def test_nms_equals_the_loop(offset, origin, step):
    """From 2^24 on fp32 holds even numbers only, as in batched_nms with many classes and large images."""
    draw = random.Random(origin + offset)
    for _ in range(1000):
        count, tenths = draw.randrange(13), draw.randrange(11)
        boxes = [[origin + step * c for c in box] for box in draw_boxes(draw, count)]
        scores = [s / 16 for s in draw.sample(range(1, 17), count)]
        expected = nms_loop(boxes, scores, tenths, offset)
        found = ext.nms(tensor(boxes), torch.tensor(scores), iou_threshold=tenths / 10, offset=offset)
        assert found.dtype == torch.int64 and found.tolist() == expected, (boxes, scores, tenths)


@given(st.data())
def test_nms_of_equal_scores_is_valid(data):
    """Which of two boxes of the same score stays is free: those kept do not overlap, and the others had a reason."""
    draw = data.draw(st.randoms(use_true_random=True))
    for _ in range(20):
        count, tenths, offset = draw.randrange(13), draw.randrange(11), draw.randrange(2)
        boxes, scores = draw_boxes(draw, count), [draw.randrange(3) for _ in range(count)]
        kept = ext.nms(tensor(boxes), torch.tensor(scores).float(), iou_threshold=tenths / 10, offset=offset).tolist()
        assert [scores[i] for i in kept] == sorted((scores[i] for i in kept), reverse=True)
        for i in range(count):
            better = [k for k in kept if k != i and (i in kept or scores[k] >= scores[i])]
            assert any(overlaps(boxes[i], boxes[k], tenths, offset) for k in better) == (i not in kept)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nms_of_any_coordinates(dtype, offset):
    rng = np.random.default_rng(offset)
    for _ in range(200):
        corner = rng.uniform(-5, 20, (10, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(0, 15, (10, 2))], 1).astype(np.float32)
        scores, threshold = rng.permutation(10) / 10, rng.uniform(0, 0.9)
        kept = []
        for i in np.argsort(-scores):
            for k in kept:
                a, b = boxes[i].astype(float), boxes[k].astype(float)
                inter = np.maximum(0, np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]) + offset).prod()
                if inter / ((a[2:] - a[:2] + offset).prod() + (b[2:] - b[:2] + offset).prod() - inter) > threshold:
                    break
            else:
                kept.append(i)
        found = ext.nms(torch.tensor(boxes, dtype=dtype), torch.tensor(scores, dtype=dtype), threshold, offset)
        assert found.tolist() == kept


def test_overlap_equal_to_the_threshold_is_kept():
    """In fp32 3/5 and 1/10 are above the doubles 0.6 and 0.1, in which torchvision compares."""
    boxes = tensor([[0, 0, 10, 10], [0, 0, 6, 10], [0, 0, 10, 1]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    for dtype in (torch.float32, torch.float64):
        for threshold, kept in ((0.6, [0, 1, 2]), (0.59, [0, 2]), (0.1, [0, 2]), (0.09, [0])):
            assert ext.nms(boxes.to(dtype), scores, threshold).tolist() == kept


@pytest.mark.parametrize("boxes_dtype", [*HALF, torch.float32, torch.int64])
@pytest.mark.parametrize("scores_dtype", [*HALF, torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0, 1])
def test_nms_of_other_types(boxes_dtype, scores_dtype, offset):
    boxes, scores = tensor([[0, 0, 9, 9], [0, 0, 9, 8], [20, 20, 30, 30]]), torch.tensor([0.5, 0.75, 0.25])
    assert ext.nms(boxes.to(boxes_dtype), scores.to(scores_dtype), 0.5, offset).tolist() == [1, 2]


def test_nms_orders_by_the_scores_as_given():
    boxes, scores = tensor([[0, 0, 9, 9]] * 2), torch.tensor([0.5, 0.5 + 1e-12], dtype=torch.float64)
    assert ext.nms(boxes, scores, 0.5).tolist() == [1]  # in fp32 they are equal


def test_nms_through_mmcv():
    boxes, scores = tensor([[0, 0, 9, 9], [0, 0, 9, 8], [20, 20, 30, 30]]), torch.tensor([0.5, 0.75, 0.25])
    for kind in (lambda t: t, lambda t: t.numpy(), lambda t: t.double().numpy()):
        dets, kept = mmcv.ops.nms(kind(boxes), kind(scores), 0.5)
        assert type(dets) is type(kept) is type(kind(boxes))
        assert kept.tolist() == [1, 2] and dets.tolist() == [[0, 0, 9, 8, 0.75], [20, 20, 30, 30, 0.25]]
    assert mmcv.ops.nms(boxes, scores, 0.5, max_num=1)[1].tolist() == [1]
    assert mmcv.ops.nms(boxes, scores, 0.5, score_threshold=0.3)[1].tolist() == [1]
    assert mmcv.ops.nms(boxes, scores, 0.5, score_threshold=0.8)[1].tolist() == []
    dets, kept = mmcv.ops.nms(boxes[:0], scores[:0], 0.5, 1)
    assert dets.shape == (0, 5) and kept.shape == (0,) and kept.dtype == torch.int64


@pytest.mark.parametrize("split", [{}, {"split_thr": 3}], ids=["offsets", "split"])
def test_batched_nms_is_nms_of_each_class(split):
    draw = random.Random(0)
    for _ in range(300):
        count, tenths, offset, most = (
            1 + draw.randrange(15),
            draw.randrange(1, 10),
            draw.randrange(2),
            draw.randrange(6),
        )
        boxes, scores = draw_boxes(draw, count), [s / 16 for s in draw.sample(range(1, 17), count)]
        classes = [draw.randrange(3) for _ in range(count)]
        expected = []
        for c in range(3):
            members = [i for i in range(count) if classes[i] == c]
            kept = nms_loop([boxes[i] for i in members], [scores[i] for i in members], tenths, offset)
            expected += [members[k] for k in kept]
        expected = sorted(expected, key=lambda i: -scores[i])[: most or None]
        cfg = {"type": "nms", "iou_threshold": tenths / 10, "offset": offset, "max_num": most or -1, **split}
        dets, kept = mmcv.ops.batched_nms(tensor(boxes), torch.tensor(scores), torch.tensor(classes), cfg)
        assert kept.tolist() == expected
        assert dets.tolist() == [[*map(float, boxes[i]), scores[i]] for i in expected]


def test_batched_nms_over_all_classes_or_none():
    boxes, scores = tensor([[0, 0, 9, 9], [0, 0, 9, 8], [20, 20, 30, 30]]), torch.tensor([0.5, 0.75, 0.25])
    cfg = {"type": "nms", "iou_threshold": 0.5}
    classes = torch.arange(3)
    assert mmcv.ops.batched_nms(boxes, scores, classes, cfg)[1].tolist() == [1, 0, 2]
    assert mmcv.ops.batched_nms(boxes, scores, classes, cfg, class_agnostic=True)[1].tolist() == [1, 2]
    assert mmcv.ops.batched_nms(boxes, scores, classes, None)[1].tolist() == [1, 0, 2]


# roi_align


def hat(position, size):
    """Bilinear weights (size,) of a sample: up to a pixel outside those of the border, none beyond."""
    if position < -1 or position > size:
        return np.zeros(size)
    return np.maximum(0, 1 - np.abs(np.arange(size) - min(max(position, 0), size - 1)))


def bins(start, end, count, size, ratio, aligned):
    """(count, size): what each bin takes of each pixel, in one direction."""
    shift = 0.5 if aligned else 0
    start, extent = start - shift, (end - shift) - (start - shift)
    extent = extent if aligned else max(extent, 1)
    step, samples = extent / count, ratio if ratio > 0 else math.ceil(extent / count)
    rows = np.zeros((count, size))
    for b in range(count):
        for s in range(samples):
            rows[b] += hat(start + b * step + (s + 0.5) * step / samples, size) / samples
    return rows


def roi_align_matrix(rois, shape, out, scale, ratio, aligned):
    """(N, h, w, B, H, W): roi_align is linear in the features, and its gradient is the transposed matrix."""
    matrix = np.zeros((len(rois), *out, *shape))
    for n, (index, x1, y1, x2, y2) in enumerate(np.asarray(rois, dtype=float)):
        rows = bins(y1 * scale, y2 * scale, out[0], shape[1], ratio, aligned)
        columns = bins(x1 * scale, x2 * scale, out[1], shape[2], ratio, aligned)
        matrix[n, :, :, int(index)] = np.einsum("hy,wx->hwyx", rows, columns)
    return matrix


def both(rois, features, out, scale=1.0, ratio=0, aligned=True):
    """Output and gradient from mmcv's layer; the same from the matrix."""
    features = features.detach().requires_grad_()
    output = mmcv.ops.RoIAlign(out, scale, ratio, aligned=aligned)(features, rois)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    (output * weight).sum().backward()
    batch, _, height, width = features.shape
    matrix = roi_align_matrix(rois.double(), (batch, height, width), out, scale, ratio, aligned)
    expected = np.einsum("nhwbyx,bcyx->nchw", matrix, features.detach().double())
    gradient = np.einsum("nhwbyx,nchw->bcyx", matrix, weight.double())
    assert output.dtype == features.dtype == features.grad.dtype
    return (output.detach(), features.grad), (torch.from_numpy(expected), torch.from_numpy(gradient))


def draw_rois(rng, count, batch, size, scale):
    """Quarter pixels from well outside the map to well outside on the other side, some without width or height."""
    corners = rng.integers(-12, 4 * size + 12, (count, 2, 2)) / 4
    low, high = np.minimum(corners[:, 0], corners[:, 1]), np.maximum(corners[:, 0], corners[:, 1])
    high = np.where(rng.random((count, 2)) < 0.1, low, high)
    return torch.from_numpy(np.concatenate([rng.integers(0, batch, (count, 1)), low / scale, high / scale], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 1, 2, 3])
def test_roi_align_and_gradient_equal_the_matrix(dtype, aligned, ratio):
    rng = np.random.default_rng(ratio)
    for case in range(80):
        batch, size, scale = rng.integers(1, 4), rng.integers(1, 8), 2.0 ** -rng.integers(-1, 5)
        out = tuple(2 ** int(n) for n in rng.integers(0, 3, 2))  # exact bins: no sample is rounded over the edge
        features = torch.from_numpy(rng.standard_normal((batch, rng.integers(1, 4), size, size + 2))).to(dtype)
        if case % 4 == 0:
            features = features.to(memory_format=torch.channels_last)
        rois = draw_rois(rng, rng.integers(0, 5), batch, size, scale).to(dtype)
        tolerance = {"atol": 2e-6, "rtol": 2e-5} if dtype == torch.float32 else {"atol": 1e-12, "rtol": 1e-12}
        found, expected = both(rois, features, out, scale, ratio, aligned)
        torch.testing.assert_close(found, tuple(e.to(dtype) for e in expected), **tolerance)


@given(st.floats(0.05, 3), st.integers(0, 3), st.booleans(), st.integers(0, 10**6))
def test_roi_align_of_any_scale(scale, ratio, aligned, seed):
    rng = np.random.default_rng(seed)
    features = torch.from_numpy(rng.standard_normal((2, 2, 6, 5)))
    corner = rng.uniform(-2, 6, (4, 2)) / scale
    boxes = np.concatenate([rng.integers(0, 2, (4, 1)), corner, corner + rng.uniform(0, 6, (4, 2)) / scale], 1)
    found, expected = both(torch.from_numpy(boxes), features, (3, 2), scale, ratio, aligned)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("aligned", [True, False])
def test_finite_differences_agree_with_the_gradient(aligned):
    rois = torch.tensor([[0, 1, 2, 9, 7], [1, -3, 0, 4.5, 20], [1, 5, 5, 5, 5]]).double()
    features = torch.randn(2, 2, 5, 6, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    layer = mmcv.ops.RoIAlign((2, 3), 0.5, 0, aligned=aligned)
    assert torch.autograd.gradcheck(lambda f: layer(f, rois), (features,))


def test_gradient_is_added():
    """As the compiled kernel does: what is in `grad_input` before stays."""
    rois, ones = torch.tensor([[0, 0, 0, 4.0, 4.0]]), torch.ones(1, 1, 2, 2)
    common = dict(spatial_scale=1.0, sampling_ratio=2, pool_mode=1, aligned=True, aligned_height=2, aligned_width=2)
    once, none = torch.zeros(1, 1, 4, 4), torch.zeros(0)
    ext.roi_align_backward(ones, rois, none, none, once, **common)
    twice = once.clone()
    ext.roi_align_backward(ones, rois, none, none, twice, **common)
    assert once.sum().item() == pytest.approx(4) and torch.equal(twice, 2 * once)


@pytest.mark.parametrize("dtype", HALF)
def test_half_types_are_computed_in_fp32(dtype):
    """Boxes and features are what the type holds; the result is rounded once, at the end."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 3, 16, 16, generator=generator).to(dtype)
    rois = torch.tensor([[0, 3, 5, 90, 77], [1, 0, 0, 128, 128], [1, 61, 9, 70, 127]]).to(dtype)
    for ratio in (0, 2):
        found, expected = both(rois, features, (7, 7), 1 / 8, ratio)
        for f, e in zip(found, expected, strict=True):
            rounding = torch.finfo(dtype).eps / 2
            torch.testing.assert_close(f.double(), e, atol=1e-5, rtol=1.01 * rounding)


@pytest.mark.parametrize("batch, count", [(2, 0), (0, 0), (1, 3)])
@pytest.mark.parametrize("aligned", [True, False])
def test_empty_inputs_and_boxes_without_area(batch, count, aligned):
    features = torch.ones(batch, 3, 8, 8, requires_grad=True)
    rois = torch.tensor([[0, 2, 2, 2, 2], [0, 2, 2, 5, 2], [0, 50, 50, 60, 60.0]])[:count]
    output = mmcv.ops.RoIAlign((2, 2), 1.0, 0, aligned=aligned)(features, rois)
    output.sum().backward()
    assert output.shape == (count, 3, 2, 2) and features.grad.shape == features.shape
    # With aligned=False a box is at least one pixel wide; far outside there is nothing to sample.
    assert output.flatten(1).amax(1).tolist() == ([0.0, 0, 0] if aligned else [1.0, 1, 0])[:count]
    assert features.grad.sum().item() == pytest.approx(0 if aligned else 24 * min(count, 1))


@pytest.mark.parametrize("box", [(5, 0, 4, 9), (0, 5, 9, 4), (5, 5, 4, 4), (0, 0, math.nan, 4)])
def test_negative_size_is_refused_as_by_the_compiled_kernel(box):
    features, rois = torch.randn(1, 1, 8, 8), torch.tensor([[0, 0, 0, 4, 4], [0, *box]]).float()
    with pytest.raises(RuntimeError, match="negative or undefined size"):
        mmcv.ops.roi_align(features, rois, 2, 1.0, 0, "avg", True)
    if not math.isnan(box[2]):
        found, expected = both(rois, features, (2, 2), aligned=False)  # taken as one pixel wide
        torch.testing.assert_close(found, tuple(e.float() for e in expected), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("index, fails", [(-1, True), (2, True), (0, False), (1, False)])
def test_boxes_of_no_image_are_refused(index, fails):
    features, rois = torch.randn(2, 1, 8, 8), torch.tensor([[index, 0, 0, 4, 4.0]])
    if fails:
        with pytest.raises(RuntimeError, match=r"outside the batch.*\[0, 2\)"):
            mmcv.ops.roi_align(features, rois, 2)
    else:
        assert mmcv.ops.roi_align(features, rois, 2).shape == (1, 1, 2, 2)
