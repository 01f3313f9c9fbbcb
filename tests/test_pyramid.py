"""ViTDet's simple feature pyramid: equal to its definition, with levels of the sizes of their strides."""

import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vitdet_forms import DIM, build, plain, random

from semaim.models.vitdet import SimpleFeaturePyramid


def slow_norm(x, p, name):
    return oracle.norm(x.permute(0, 2, 3, 1), p, name).permute(0, 3, 1, 2)


def slow_upsampling(x, p, name):
    """Transposed convolution 2x2/2: every position becomes four."""
    out = torch.einsum("bchw,cdij->bdhiwj", x, p[f"{name}.weight"]).flatten(4).flatten(2, 3)
    return out + p[f"{name}.bias"][:, None, None]


def slow_level(x, p, name):
    if name == "p2":
        x = slow_norm(slow_upsampling(x, p, "p2.resample.0"), p, "p2.resample.1")
        x = slow_upsampling(0.5 * x * (1 + torch.erf(x / math.sqrt(2))), p, "p2.resample.3")
    elif name == "p3":
        x = slow_upsampling(x, p, "p3.resample.0")
    elif name == "p5":
        x = x.unfold(2, 2, 2).unfold(3, 2, 2).amax((-2, -1))
    x = slow_norm(torch.einsum("bchw,dc->bdhw", x, p[f"{name}.lateral.weight"][..., 0, 0]), p, f"{name}.lateral_norm")
    x = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
    return slow_norm(torch.einsum("bchwij,dcij->bdhw", x, p[f"{name}.output.weight"]), p, f"{name}.output_norm")


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (2, 3)])
def test_pyramid_equals_its_definition(grid):
    torch.manual_seed(1)
    pyramid = SimpleFeaturePyramid(12, 8).double()
    for parameter in pyramid.parameters():
        nn.init.normal_(parameter)
    maps, p = random(2, 12, *grid).double(), plain(pyramid.levels)
    levels = dict(zip(pyramid.names, pyramid(maps), strict=True))
    for name in ("p2", "p3", "p4", "p5"):
        torch.testing.assert_close(levels[name], slow_level(maps, p, name), atol=1e-9, rtol=1e-9, msg=name)
    assert torch.equal(levels["p6"], levels["p5"][..., ::2, ::2])
    assert len(p) == 2 + 2 + 2 + 2 + 4 * (2 + 2 * 2)


def test_levels_have_the_sizes_of_their_strides():
    pyramid = SimpleFeaturePyramid(DIM, 8)
    assert pyramid.strides == (4, 8, 16, 32, 64) and pyramid.names == ("p2", "p3", "p4", "p5", "p6")
    maps = build(patch_size=16, img_size=128, pretrain_img_size=32)(random(1, 3, 128, 192))
    for level, stride in zip(pyramid(maps), pyramid.strides, strict=True):
        assert level.shape == (1, 8, 128 // stride, 192 // stride)
    fewer = SimpleFeaturePyramid(DIM, 8, stride=8, scales=(1, 0.5), extra_level=False)
    assert fewer.strides == (8, 16) and fewer.names == ("p3", "p4") and len(fewer(maps)) == 2


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(scales=(4, 1)), "twice the one before"),
        (dict(scales=(0.5, 1)), "twice the one before"),
        (dict(stride=14), "power of two"),
        (dict(stride=2), "power of two"),
        (dict(scales=(8, 4)), "a level of scale 8"),
    ],
)
def test_wrong_pyramids(wrong, message):
    with pytest.raises(ValueError, match=message):
        SimpleFeaturePyramid(8, 8, **wrong)
