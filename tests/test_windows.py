"""Attention within windows: equal to timm's own code with a mask of all tokens written out, for every kind of block."""

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from encoder_files import images_of, loaded, random_state, source_of, state_of
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from semaim.encoders import windows
from semaim.encoders.networks import PlainViTDet, dividing
from semaim.encoders.own import OwnEncoder
from semaim.encoders.windows import Geometry, Windows, restrict, spans
from semaim.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

#: Architecture: what its blocks do.
KINDS = {
    "vit_base_patch16_siglip_gap_224": "no prefix",
    "vit_tiny_patch16_224": "a class token",
    "deit_tiny_distilled_patch16_224": "two prefix tokens",
    "vit_small_patch14_reg4_dinov2": "a class token and four registers, layer scale",
    "vit_small_patch16_18x2_224": "two attentions side by side",
    "vit_pwee_patch16_reg1_gap_256": "attention beside the MLP, norms of queries and keys",
    "vit_dlittle_patch16_reg1_gap_256": "the difference of two attentions",
    "vit_base_patch16_rpn_224": "norms after the attention",
    "eva02_tiny_patch14_224": "rotary positions of the axes",
    "vit_small_patch16_dinov3": "DINOv3's rotary positions, registers",
    "vit_small_patch16_rope_mixed_224": "rotary positions of each block, learned",
    "vit_base_patch16_sapiens2": "keys and values shared by heads, norms of queries and keys",
    "beit_base_patch16_224": "tables of relative positions",
}
#: (rows, columns) of patches, and the side of the windows: whole ones, smaller ones at the edges, one window.
GRIDS = {"whole": ((4, 6), 2), "edges": ((5, 7), 3), "row": ((4, 9), 4), "one": ((3, 5), 8)}
PATCH = 4
TABLE = "blocks.0.attn.relative_position_bias_table"
OTHERS = ("beit_base_patch16_224", "vit_small_patch16_18x2_224", "vit_pwee_patch16_reg1_gap_256")


def pixels(grid):
    return grid[0] * PATCH, grid[1] * PATCH


def detector(arch, grid, window, **options):
    """In fp64: a windowed block, then a global one."""
    source = source_of(arch)
    options = {"global_blocks": (1,), "out_blocks": (0, 1), **options}
    network = PlainViTDet(source.description, pixels(grid), PATCH, window, **options)
    network.encoder.load(source)
    return network.double().eval()


# The slow form


def slow_mask(grid, window, prefix, seen):
    """Which tokens see which: (N, N), query by key; window 0 is the whole map."""
    side = window or max(grid)
    places = torch.tensor([(row // side, column // side) for row in range(grid[0]) for column in range(grid[1])])
    mask = F.pad((places[:, None] == places).all(dim=2), (prefix, 0, prefix, 0), value=False)
    mask[:prefix] = True
    mask[:, :prefix] |= seen
    return mask


def slow_table(table, grid):
    """The bias (heads, N, N) from a table of offsets between patches, whatever window they are in."""
    side = (math.isqrt(len(table) - 3) + 1) // 2
    places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    index = torch.full((1 + len(places), 1 + len(places)), len(table) - 1)
    for query, (row, column) in enumerate(places):
        for key, (other_row, other_column) in enumerate(places):
            down, right = row - other_row + side - 1, column - other_column + side - 1
            inside = 0 <= down < 2 * side - 1 and 0 <= right < 2 * side - 1
            index[1 + query, 1 + key] = down * (2 * side - 1) + right if inside else 0  # outside: masked
    index[0, 1:], index[1:, 0] = len(table) - 3, len(table) - 2
    return table[index].permute(2, 0, 1)


def slow_maps(encoder, images, grid, window, seen=True, table=None, whole=(1,)):
    """Maps of timm's or our network, with attention written out; `table` is that of the windows."""
    current = {}

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False):
        assert not dropout_p and not is_causal
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
        if table is not None and current["window"]:
            scores = scores + slow_table(table, grid)
        elif attn_mask is not None:
            scores = scores + attn_mask
        mask = slow_mask(grid, current["window"], encoder.num_prefix_tokens, seen)
        return scores.masked_fill(~mask, -math.inf).softmax(dim=-1) @ value

    hooks = [
        block.register_forward_pre_hook(lambda *_, size=0 if index in whole else window: current.update(window=size))
        for index, block in enumerate(encoder.blocks)
    ]
    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        maps = encoder.maps(images, range(encoder.depth))
    for hook in hooks:
        hook.remove()
    return maps


def plain(arch, grid):
    """The encoder without windows, in fp64."""
    return loaded(arch, img_size=pixels(grid), patch_size=PATCH).double()


def gradients(maps, module):
    """Gradients of a random sum of the maps, by name in the encoder."""
    total = sum((found * images_of(found.shape[-2:])[0, 0].double()).sum() for found in maps)
    names, parameters = zip(*((n, p) for n, p in module.named_parameters() if p.requires_grad), strict=True)
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return {name.removeprefix("encoder."): one for name, one in zip(names, found, strict=True)}


def assert_same(found, expected):
    assert found.keys() <= expected.keys()
    for name, gradient in found.items():
        assert gradient is not None, name
        torch.testing.assert_close(gradient, expected[name], atol=1e-8, rtol=1e-7, msg=name)


@pytest.mark.parametrize("form", [*GRIDS, "dropped"])
@pytest.mark.parametrize("arch", KINDS)
def test_windows_equal_timms_code_with_a_mask(arch, form):
    (grid, window), seen = GRIDS.get(form, GRIDS["edges"]), form != "dropped"
    images = images_of(pixels(grid), images=2).double()
    network = detector(arch, grid, window, prefix="seen" if seen else "dropped")
    encoder = plain(arch, grid)
    table = network.encoder.vit.get_parameter(TABLE).detach() if arch.startswith("beit") else None
    expected = slow_maps(encoder, images, grid, window, seen, table)
    found = network(images)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)
    differs = (found[1] - encoder.maps(images, (1,))[0]).abs().max() > 1e-3
    assert differs == (form != "one")
    if table is None:
        assert_same(gradients(found, network), gradients(expected, encoder))


def test_windows_of_our_own_vit_equal_it_with_a_mask():
    grid, window = GRIDS["edges"]
    images = images_of(pixels(grid), images=2).double()
    description = OwnEncoder(embed_dim=32, depth=2, num_heads=2, patch_size=PATCH, img_size=pixels(grid)).description
    network = PlainViTDet(description, pixels(grid), PATCH, window, global_blocks=(1,), out_blocks=(0, 1)).double()
    network.encoder.load_state_dict(random_state(network.encoder), strict=True)
    encoder = OwnEncoder(**{k: v for k, v in description.items() if k != "family"}, img_size=pixels(grid)).double()
    encoder.load_state_dict(network.encoder.state_dict(), strict=False)
    for found, expected in zip(network(images), slow_maps(encoder, images, grid, window), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


# Tables of relative positions


@pytest.mark.parametrize("seen", [True, False])
def test_a_bias_of_all_tokens_is_read_at_the_tokens_places(seen):
    grid, window, prefix = (5, 7), 3, 2
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 37, 8, generator=generator, dtype=torch.float64)
    bias = torch.randn(4, 37, 37, generator=generator, dtype=torch.float64)
    mask = slow_mask(grid, window, prefix, seen)
    scores = query @ key.transpose(-2, -1) / math.sqrt(8) + bias
    expected = scores.masked_fill(~mask, -math.inf).softmax(dim=-1) @ value
    for form in (bias, bias[None]):
        with Windows(Geometry(prefix, seen, grid), window):
            found = F.scaled_dot_product_attention(query, key, value, attn_mask=form)
        torch.testing.assert_close(found[:, :, prefix:], expected[:, :, prefix:], atol=1e-12, rtol=1e-12)
        if seen:
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("grid", [(20, 17), (28, 14), (5, 9), (7, 28)], ids=str)
@torch.no_grad()
def test_windows_see_the_table_of_pretraining_by_offset(grid):
    arch = "beit_base_patch16_224"
    network = detector(arch, grid, window=None)
    assert network.window_size == 14
    images = images_of(pixels(grid)).double()
    expected = slow_maps(plain(arch, grid), images, grid, 14, table=state_of(arch)[TABLE].double())
    for found, wanted in zip(network(images), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-8, rtol=1e-8)


def test_a_detector_sees_the_same_windows_in_images_of_another_size():
    arch, grid, other = "beit_base_patch16_224", (20, 17), (15, 16)
    network = detector(arch, grid, window=None)
    images = images_of(pixels(other)).double()
    with torch.no_grad():
        expected = detector(arch, other, window=None)(images)
        found = network(images)
    torch.testing.assert_close(found[0], expected[0], atol=1e-9, rtol=1e-9)
    assert found[1].shape == expected[1].shape  # of the global block, whose table is resized from the training's
    with pytest.raises(UserError, match="is trained on 60 x 64: set img_size to that"):
        network.train()(images)


# Training


@pytest.mark.parametrize("arch", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_rope_mixed_224", *OTHERS])
def test_recomputed_activations_give_the_same_maps_and_gradients(arch):
    grid, window = GRIDS["edges"]
    images = images_of(pixels(grid), images=2).double()
    stored, recomputed = detector(arch, grid, window), detector(arch, grid, window, with_cp=True)
    calls = [0, 0]
    for count, network in enumerate((stored, recomputed)):
        network.encoder.blocks[0].register_forward_pre_hook(
            lambda *_, count=count: calls.__setitem__(count, calls[count] + 1)
        )
    ours, expected = (network.train()(images) for network in (recomputed, stored))
    for found, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)
    found, wanted = gradients(ours, recomputed), gradients(expected, stored)
    assert found.keys() == wanted.keys()
    assert_same(found, wanted)
    assert calls == [1, 2]


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_224"])
def test_no_map_depends_on_dropped_prefix_tokens(arch):
    grid, window = GRIDS["edges"]
    images = images_of(pixels(grid)).double()
    for prefix, changed in (("dropped", False), ("seen", True)):
        network = detector(arch, grid, window, prefix=prefix)
        before = network(images)
        for name, parameter in network.encoder.named_parameters():
            if name.endswith(("cls_token", "reg_token")):
                assert parameter.requires_grad == changed
                parameter.data += torch.linspace(-1, 1, parameter.numel()).view_as(parameter)
        for one, other in zip(before, network(images), strict=True):
            assert torch.equal(one, other) != changed


# Parts


@given(side=st.integers(1, 40), window=st.integers(1, 20))
def test_spans_cover_an_axis_once_with_windows_and_a_rest(side, window):
    found = list(spans(side, window))
    assert [found[0][0], *(stop for _, stop, _ in found)] == sorted({0, side // window * window, side})
    edges = [place for start, stop, width in found for place in range(start, stop, width)]
    assert edges == list(range(0, side, window))
    assert all((stop - start) % width == 0 for start, stop, width in found)


@given(st.integers(1, 3), st.integers(1, 2), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_cutting_puts_each_window_in_a_row_and_joining_undoes_it(images, heads, rows, columns, tall, wide):
    maps = torch.arange(images * heads * rows * tall * columns * wide * 2).view(
        images, heads, rows * tall, columns * wide, 2
    )
    cut = windows._cut(maps, tall, wide)
    expected = [
        maps[image, :, row * tall : (row + 1) * tall, column * wide : (column + 1) * wide].flatten(1, 2)
        for image in range(images)
        for row in range(rows)
        for column in range(columns)
    ]
    assert torch.equal(cut, torch.stack(expected))
    assert torch.equal(windows._join(cut, images, rows, tall, wide), maps)


@pytest.mark.parametrize(
    ("grid", "window"), [((64, 64), 16), ((48, 32), 16), ((14, 28), 14), ((37, 37), 16), ((5, 5), 5), ((70, 42), 14)]
)
def test_the_window_left_open_divides_the_map_where_it_can(grid, window):
    assert dividing(grid) == window


# Mistakes


def test_a_block_without_pytorchs_attention_is_refused():
    block = nn.Linear(2, 2)
    restrict(block, Geometry(0, grid=(1, 2)), 1, "the block")
    with pytest.raises(RuntimeError, match="the block does not use PyTorch's attention, which windows need"):
        block(torch.ones(1, 2))


def test_timms_own_products_are_switched_to_pytorchs_attention():
    with mock.patch("timm.layers.attention.use_fused_attn", lambda *_: False):
        network = PlainViTDet(source_of("vit_tiny_patch16_224").description, 96, 16, 2, global_blocks=(1,))
    assert [block.attn.fused_attn for block in network.encoder.blocks] == [True, False]
    assert network(images_of((96, 96))).shape == (1, 64, 6, 6)


def test_tokens_that_are_no_map_and_causal_attention_are_refused():
    tokens = torch.ones(1, 1, 7, 4)
    for geometry, options in ((Geometry(1, grid=(2, 2)), {}), (Geometry(1, grid=(2, 3)), {"is_causal": True})):
        with pytest.raises(ValueError, match="windows: 7 tokens"), Windows(geometry, 2):
            F.scaled_dot_product_attention(tokens, tokens, tokens, **options)
    for tables, expected in ((False, 7), (True, 10)):
        with (
            pytest.raises(ValueError, match=f"windows of 3: a bias for 5 tokens, not {expected}"),
            Windows(Geometry(1, grid=(2, 3)), 3, tables),
        ):
            F.scaled_dot_product_attention(tokens, tokens, tokens, attn_mask=torch.ones(5, 5))


def test_an_error_in_a_block_leaves_attention_as_it_was():
    network = detector("vit_tiny_patch16_224", (4, 6), 2)
    images = images_of((16, 24)).double()
    expected = network(images)
    network.encoder.blocks[0].mlp.register_forward_pre_hook(fail := mock.Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        network(images)
    query = torch.randn(1, 1, 3, 4)
    mask = torch.eye(3, dtype=torch.bool)
    torch.testing.assert_close(F.scaled_dot_product_attention(query, query, query, mask), query)
    fail.side_effect, fail.return_value = None, None
    for one, other in zip(network(images), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix": "gone"}, "prefix 'gone': choose from seen, dropped"),
        ({"global_blocks": (2,)}, r"global_blocks \(2,\): there are blocks 0 to 1"),
        ({"out_blocks": ()}, r"out_blocks \(\): there are blocks 0 to 1"),
        ({"img_size": 100}, "an image of 100 x 100 pixels is no whole number of 16 x 16 patches"),
    ],
)
def test_mistakes_in_a_detectors_config(options, message):
    with pytest.raises(UserError, match=message):
        PlainViTDet(source_of("vit_tiny_patch16_224").description, **{"img_size": 96, **options})
