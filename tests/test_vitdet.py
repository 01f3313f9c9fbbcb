"""ViTDet: equal to a slow form with every bias written out, to timm where it is a plain ViT, and lean in memory."""

import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from vitdet_forms import (
    DEPTH,
    DIM,
    HEADS,
    PATCH,
    TABLES,
    build,
    gradients,
    images_of,
    pixels,
    plain,
    random,
    slow_bias,
    slow_forward,
)

from semaim import checkpoints
from semaim.engine.optim import layer_depths
from semaim.models import PixelTarget, SemAIM, VisionTransformer
from semaim.models.vitdet import (
    MapAttention,
    SimpleFeaturePyramid,
    ViTDet,
    relative_attention,
    window_partition,
    window_unpartition,
)
from semaim.parity import vitdet
from semaim.parity.cases import Case, run_case


def assert_equals_the_slow_form(model, images):
    """Map and every gradient, in fp64."""
    model, images = model.double().train(), images.double()
    ours, expected = model(images), slow_forward(model, images)
    torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9)
    probe = random(*ours.shape, seed=3).double()
    found, wanted = gradients((ours * probe).sum(), model), gradients((expected * probe).sum(), model)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-8, rtol=1e-8, msg=name)
        # A key's bias changes no softmax, nor does the bias of keys that all stand in the same row or column.
        flat = name.endswith(TABLES) and (1 in ours.shape[2:] or model.window_size == 1)
        if not name.endswith("qkv.bias") and not flat:
            assert gradient.norm() > 1e-4, f"{name} is not trained"


# Grids that windows of 3 do and do not divide, not square, smaller than a window, of one row.
@pytest.mark.parametrize("grid", [(3, 6), (4, 4), (5, 7), (2, 5), (2, 2), (1, 4)])
def test_model_equals_the_slow_form(grid):
    assert_equals_the_slow_form(build(), images_of(grid))


@pytest.mark.parametrize(
    "options",
    [
        dict(with_cp=True),
        dict(rel_pos=False),
        dict(table=(5, 4)),
        dict(table=(9, 2)),
        dict(window_size=1),
        dict(window_size=4, global_blocks=()),
        dict(global_blocks=(0, 1, 2)),
        dict(pretrain=(5, 4)),
    ],
    ids=str,
)
def test_model_equals_the_slow_form_for_every_option(options):
    assert_equals_the_slow_form(build(**options), images_of((5, 4)))


@pytest.mark.parametrize("grid", [(4, 4), (3, 7), (1, 1), (5, 2)])
@pytest.mark.parametrize("dim", [8, 5, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relative_attention_is_attention_with_the_bias(grid, dim, dtype):
    height, width = grid
    inputs = [random(2, 3, height * width, dim, seed=seed).to(dtype).requires_grad_() for seed in range(3)]
    inputs += [random(2 * side - 1, dim, seed=side).to(dtype).requires_grad_() for side in grid]
    query, key, value, *tables = inputs
    ours = relative_attention(query, key, value, grid, *tables)
    bias = torch.stack([torch.stack([slow_bias(q, height, width, *tables) for q in image]) for image in query])
    expected = (query @ key.mT / math.sqrt(dim) + bias).softmax(-1) @ value
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)
    probe = random(*ours.shape, seed=9).to(dtype)
    for mine, wanted in zip(*(torch.autograd.grad((o * probe).sum(), inputs) for o in (ours, expected)), strict=True):
        torch.testing.assert_close(mine, wanted, atol=10 * tolerance, rtol=10 * tolerance)


class Sizes(TorchDispatchMode):
    """Records each operation below autograd, in both passes, with its largest result."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.seen[str(func)] = max(self.seen.get(str(func), 0), tensor.numel())
        return out


@pytest.mark.parametrize("with_cp", [False, True])
@pytest.mark.parametrize("backend", [None, SDPBackend.MATH])
def test_a_global_block_builds_nothing_of_the_size_of_its_attention(backend, with_cp):
    """16 x 16 patches: with the CPU's flash kernel no tensor has 256 * 256 numbers, while plain attention has."""
    model = build(table=(16, 16), pretrain=(16, 16), depth=1, global_blocks=(0,), with_cp=with_cp).train()
    images = images_of((16, 16), batch=1)
    with Sizes() as sizes:
        if backend is None:
            model(images).sum().backward()
        else:
            with sdpa_kernel(backend):
                model(images).sum().backward()
    attention = [name for name in sizes.seen if "flash_attention" in name]
    if backend is None:
        assert any(name.endswith("backward.default") for name in attention) and len(attention) == 2
        assert max(sizes.seen.values()) < 256 * 256
    else:  # what the recording would have seen
        assert not attention and max(sizes.seen.values()) == HEADS * 256 * 256


@pytest.mark.parametrize(
    "dim, grid, width", [(8, (4, 4), 16), (10, (5, 4), 24), (64, (14, 14), 96), (64, (64, 64), 192)]
)
def test_fused_kernels_get_one_head_width_that_8_divides(monkeypatch, dim, grid, width):
    """What flash attention asks for on a GPU; elsewhere nothing would show."""
    seen = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv, scale: seen.extend(qkv) or qkv[2])
    inputs = [torch.zeros(1, 1, grid[0] * grid[1], dim) for _ in range(3)]
    relative_attention(*inputs, grid, *(torch.zeros(2 * side - 1, dim) for side in grid))
    assert [tensor.shape[-1] for tensor in seen] == [width] * 3


# Windows


@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3)), window=st.integers(1, 5)
)
def test_partition_and_back(size, window):
    maps = random(*size)
    windows = window_partition(maps, window)
    rows, columns = -(-size[1] // window), -(-size[2] // window)
    assert windows.shape == (size[0] * rows * columns, window, window, size[3])
    assert torch.equal(window_unpartition(windows, size[1:3]), maps)
    padded = torch.zeros(size[0], rows * window, columns * window, size[3])
    padded[:, : size[1], : size[2]] = maps
    index = 0
    for image in padded:
        for top in range(0, rows * window, window):
            for left in range(0, columns * window, window):
                assert torch.equal(windows[index], image[top : top + window, left : left + window])
                index += 1


def test_a_window_that_covers_the_map_is_global_attention():
    windowed = build(table=(4, 4), window_size=4, global_blocks=())
    whole = build(table=(4, 4), window_size=4, global_blocks=(0, 1, 2))
    whole.load_state_dict(windowed.state_dict())
    torch.testing.assert_close(windowed(images_of((4, 4))), whole(images_of((4, 4))))
    # With a padded row, which takes part, it is not; nor with two windows.
    for grid in ((3, 4), (4, 8)):
        assert (windowed(images_of(grid)) - whole(images_of(grid))).abs().max() > 1e-2


def test_windows_do_not_see_each_other_and_global_blocks_see_all():
    images = images_of((6, 6), batch=1)
    changed = images.clone()
    changed[..., : 3 * PATCH, : 3 * PATCH] += 1  # the first window
    for blocks, leaks in (((), False), ((2,), True)):
        model = build(global_blocks=blocks)
        moved = (model(images) - model(changed)).abs().amax(1)[0] > 1e-6
        assert moved[:3, :3].all() and (moved.all() if leaks else moved.sum() == 9)


# Against the encoder and its checkpoints


def test_without_windows_and_relative_positions_it_is_timms_vit():
    theirs = TimmViT(
        img_size=pixels((3, 5)), patch_size=PATCH, num_classes=0, global_pool="", class_token=False,
        embed_dim=DIM, depth=DEPTH, num_heads=HEADS, norm_layer=partial(nn.LayerNorm, eps=1e-6),
    ).eval()  # fmt: skip
    theirs.norm = nn.Identity()
    ours = build(global_blocks=range(3), rel_pos=False)
    theirs.load_state_dict(ours.state_dict())  # strict: the very same names
    images = images_of((3, 5))
    expected = theirs.forward_features(images).transpose(1, 2).unflatten(2, (3, 5))
    torch.testing.assert_close(ours(images), expected, atol=1e-5, rtol=1e-5)


def test_relative_positions_start_at_zero_and_change_nothing():
    options = dict(patch_size=PATCH, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, window_size=3, img_size=64)
    torch.manual_seed(0)
    with_tables = ViTDet(pretrain_img_size=12, **options)
    without = ViTDet(pretrain_img_size=12, rel_pos=False, **options)
    new = set(with_tables.state_dict()) - set(without.state_dict())
    assert new == {f"blocks.{index}.attn.{table}" for index in range(3) for table in TABLES}
    assert not any(with_tables.state_dict()[name].any() for name in new)
    without.load_state_dict({name: t for name, t in with_tables.state_dict().items() if name not in new})
    images = images_of((5, 4))
    torch.testing.assert_close(with_tables(images), without(images), atol=1e-5, rtol=1e-5)


def test_names_and_start_are_the_encoders():
    size = dict(patch_size=PATCH, embed_dim=DIM, depth=DEPTH, num_heads=HEADS)
    torch.manual_seed(0)
    encoder = VisionTransformer(img_size=16, **size)
    torch.manual_seed(0)
    model = ViTDet(img_size=32, pretrain_img_size=16, **size)
    own = {name: t for name, t in model.state_dict().items() if not name.endswith(TABLES)}
    expected = {name: t for name, t in encoder.state_dict().items() if name.split(".")[0] not in ("cls_token", "norm")}
    expected["pos_embed"] = expected["pos_embed"][:, 1:]
    assert own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in own)
    assert model.pos_embed.requires_grad and model.pos_embed.is_leaf
    assert model.pos_embed.stride() == torch.empty(model.pos_embed.shape).stride()


def test_pretraining_flows_in(tmp_path):
    size = dict(patch_size=PATCH, embed_dim=DIM, depth=DEPTH, num_heads=HEADS)
    source = SemAIM(PixelTarget((PATCH, PATCH)), img_size=16, **size)
    torch.save({"model": source.state_dict()}, tmp_path / "latest.pth")
    model = ViTDet(img_size=32, pretrain_img_size=16, window_size=3, global_blocks=(1,), **size)
    report = checkpoints.load(model, tmp_path / "latest.pth", expected=TABLES)
    own, theirs = model.state_dict(), source.state_dict()
    assert set(report.new) == {name for name in own if name.endswith(TABLES)} and not report.missing
    assert set(report.matched) == set(own) - set(report.new)
    assert report.resized == [f"pos_embed (1, 17, {DIM}) -> (1, 16, {DIM})"]
    left = {name.split(".")[0] for name in report.unexpected}
    assert left == {"cls_token", "norm", "query_blocks", "prediction_head"}
    assert torch.equal(own["pos_embed"], theirs["pos_embed"][:, 1:])
    assert all(torch.equal(own[name], theirs[name]) for name in report.matched if name != "pos_embed")


@pytest.mark.parametrize(
    "size, depth, blocks",
    [
        ("base", None, (2, 5, 8, 11)),
        ("large", None, (5, 11, 17, 23)),
        ("huge", None, (7, 15, 23, 31)),
        ("base", 6, (1, 2, 4, 5)),
        ("base", 3, (0, 1, 2)),
        ("base", 1, (0,)),
    ],
)
def test_last_block_of_each_quarter_is_global(size, depth, blocks):
    with torch.device("meta"):
        model = ViTDet(size, depth=depth)
    assert model.global_blocks == blocks
    for index, block in enumerate(model.blocks):
        window, length = (0, 127) if index in blocks else (14, 27)
        assert block.attn.window == window and len(block.attn.rel_pos_h) == len(block.attn.rel_pos_w) == length


def test_a_table_for_images_that_are_not_square():
    attention = build(table=(4, 6)).blocks[1].attn
    assert (len(attention.rel_pos_h), len(attention.rel_pos_w)) == (7, 11)


# Training


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_checkpointing_changes_neither_output_nor_gradient(drop_path):
    results = []
    for with_cp in (False, True):
        model = build(drop_path_rate=drop_path, with_cp=with_cp).train()
        torch.manual_seed(0)
        out = model(images_of((5, 4), batch=4))
        results.append({"out": out, **gradients(out.square().sum(), model)})
    for name, result in results[0].items():
        torch.testing.assert_close(results[1][name], result, atol=1e-4, rtol=1e-5, msg=name)
    dropped = not torch.equal(model(images_of((5, 4))), model.eval()(images_of((5, 4))))
    assert dropped == (drop_path > 0)


def test_bfloat16_gives_nearly_the_same_map_and_gradients():
    model, images = build(), images_of((5, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 0.5
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = model(images)
        results.append([out.float(), *gradients(out.float().square().mean(), model).values()])
    for exact, rough in zip(*results, strict=True):
        assert (exact - rough).norm() < 0.03 * exact.norm() + 1e-3
    assert not torch.equal(results[0][0], results[1][0])


def test_images_of_a_batch_are_independent():
    model, images = build(), images_of((5, 4), batch=3)
    together = model(images)
    for index in range(3):
        torch.testing.assert_close(model(images[index, None])[0], together[index], atol=1e-4, rtol=1e-4)


def test_layers_of_the_encoder_and_of_what_is_outside():
    detector = nn.ModuleDict({"backbone": build(), "neck": SimpleFeaturePyramid(DIM, 8)})
    depth_of = layer_depths(detector)
    for name in plain(detector):
        parts, expected = name.split("."), DEPTH + 1
        if parts[1] in ("pos_embed", "patch_embed"):
            expected = 0
        elif parts[1] == "blocks":
            expected = int(parts[2]) + 1
        assert depth_of(name) == (expected, DEPTH + 2), name


# Errors


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(global_blocks=(1, 3)), r"global_blocks \[3\]: there are blocks 0 to 2"),
        (dict(global_blocks=(-1,)), r"global_blocks \[-1\]"),
        (dict(window_size=0), "window_size 0"),
        (dict(img_size=30), "30 x 30 pixels"),
        (dict(pretrain_img_size=30), "30 x 30 pixels"),
    ],
)
def test_wrong_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        build(**wrong)


def test_images_and_contexts_that_do_not_fit():
    with pytest.raises(ValueError, match="18 x 16 pixels"):
        build()(random(1, 3, 18, 16))
    attention, maps = MapAttention(8, 2), random(1, 3, 3, 8)
    for wrong in (dict(context=maps), dict(causal=True)):
        with pytest.raises(ValueError, match="a map attends to all of itself"):
            attention(maps, **wrong)


# Recorded results; tests/test_tools.py compares all cases.


@pytest.mark.parametrize("name", ["plain", "relpos", "lr_decay"])
def test_every_recorded_result_is_compared(shared, name):
    file = shared / f"golden/vitdet/{name}.json"
    meta = json.loads(file.read_text())
    recorded = {tensor for tensor in meta["tensors"] if not tensor.startswith(("param.", "probe."))}
    recorded |= {f"factor.{name}" for name in meta["scalars"].get("factor", ())}
    recorded |= {scalar for scalar in meta["scalars"] if scalar != "factor"}
    report = run_case(Case(file), vitdet.check)
    compared = [check.name for check in report.checks]
    assert set(compared) == recorded and len(compared) == len(recorded) and report.passed
