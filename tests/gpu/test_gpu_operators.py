"""The operators that stand in for mmcv's, on each device: roi_align as by its definition, nms as by the loop."""

import random

import numpy as np
import pytest
import torch
from test_compat import HALF, draw_boxes, draw_rois, ext, mmcv, nms_loop, roi_align_matrix, tensor


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_roi_align_and_its_gradient(dtype, aligned, device):
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.standard_normal((2, 3, 9, 9))).to(dtype)
    rois = draw_rois(rng, 50, 2, 9, 0.25).to(dtype)
    for out, ratio in (((4, 4), 0), ((2, 2), 2)):
        matrix = roi_align_matrix(rois.double(), (2, 9, 9), out, 0.25, ratio, aligned)
        leaf = features.to(device, copy=True).requires_grad_()
        output = mmcv.ops.RoIAlign(out, 0.25, ratio, aligned=aligned)(leaf, rois.to(device))
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        output.backward(weight.to(device))
        expected = np.einsum("nhwbyx,bcyx->nchw", matrix, features.double())
        gradient = np.einsum("nhwbyx,nchw->bcyx", matrix, weight.double())
        assert output.dtype == leaf.grad.dtype == dtype and output.device.type == device
        bounds = {"atol": 1e-5, "rtol": 2e-5 if dtype == torch.float32 else torch.finfo(dtype).eps}
        for found, right in ((output.detach(), expected), (leaf.grad, gradient)):
            torch.testing.assert_close(found.cpu().double(), torch.from_numpy(right), **bounds)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_nms(dtype, offset, device):
    draw = random.Random(offset)
    for _ in range(100):
        count, tenths = draw.randrange(40), draw.randrange(11)
        boxes = draw_boxes(draw, count, 12)
        scores = [s / 64 for s in draw.sample(range(1, 65), count)]
        expected = nms_loop(boxes, scores, tenths, offset)
        given = tensor(boxes).to(device, dtype), torch.tensor(scores).to(device, dtype)
        kept = ext.nms(*given, iou_threshold=tenths / 10, offset=offset)
        assert kept.device.type == device and kept.tolist() == expected, (boxes, scores, tenths)


def test_nms_of_each_class(device):
    draw = random.Random(0)
    boxes, scores = draw_boxes(draw, 200, 40), [s / 256 for s in draw.sample(range(1, 257), 200)]
    classes = [draw.randrange(3) for _ in boxes]
    expected = []
    for kind in range(3):
        members = [i for i in range(200) if classes[i] == kind]
        kept = nms_loop([boxes[i] for i in members], [scores[i] for i in members], 5, 0)
        expected += [members[k] for k in kept]
    expected.sort(key=lambda i: -scores[i])
    given = (t.to(device) for t in (tensor(boxes), torch.tensor(scores), torch.tensor(classes)))
    dets, kept = mmcv.ops.batched_nms(*given, {"type": "nms", "iou_threshold": 0.5})
    assert kept.tolist() == expected and dets[:, 4].tolist() == [scores[i] for i in expected]


def test_norms_of_a_detector_are_batch_norms_of_fp64(device):
    """One process: without a process group SyncBN is batch normalisation, on a CPU too."""
    pytest.importorskip("mmdet", reason="mmdet is not installed: runs after tools/setup.sh --extras all")
    from semaim.detection.heads import PreciseSyncBN

    torch.manual_seed(0)
    norm, plain = PreciseSyncBN(6), torch.nn.BatchNorm2d(6)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    plain.load_state_dict(norm.state_dict())
    norm, plain = norm.to(device), plain.double()
    for low in (False, True):
        x = torch.randn(4, 6, 8, 8).to(torch.bfloat16 if low else torch.float32)
        leaf, right = x.to(device, copy=True).requires_grad_(), x.double().requires_grad_()
        out, expected = norm(leaf), plain(right)
        assert out.dtype == leaf.dtype
        weight = torch.randn(out.shape).to(out.dtype)
        out.backward(weight.to(device))
        expected.backward(weight.double())
        bounds = {"rtol": 2e-2, "atol": 2e-2} if low else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(out.detach().cpu().double(), expected.detach(), **bounds)
        torch.testing.assert_close(leaf.grad.cpu().double(), right.grad, **bounds)
    torch.testing.assert_close(norm.running_var.cpu().double(), plain.running_var, rtol=1e-4, atol=1e-5)
