"""The encoder: equal to timm's, with timm's names; patches, positions, attention."""

from functools import partial

import oracle
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn

from semaim.models.vit import (
    SIZES,
    Attention,
    Block,
    CrossAttention,
    VisionTransformer,
    patchify,
    sincos_positions,
    unpatchify,
)

TINY = dict(embed_dim=16, depth=3, num_heads=2)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomise(module, std=0.3):
    """Every parameter away from its special start: no zero bias, no unit scale, a free position table."""
    torch.manual_seed(5)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module


# Against timm


@pytest.mark.parametrize("table, image", [((16, 16), (16, 16)), ((12, 20), (12, 20)), ((16, 16), (24, 12))])
def test_encoder_equals_timm(table, image):
    theirs = TimmViT(
        img_size=table,
        patch_size=4,
        num_classes=0,
        global_pool="",
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        dynamic_img_size=True,
        **TINY,
    ).eval()
    ours = randomise(VisionTransformer(img_size=table, patch_size=4, **TINY))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = random(2, 3, *image)
    torch.testing.assert_close(ours(images), theirs.forward_features(images), atol=1e-5, rtol=1e-5)


def test_state_dict_has_exactly_the_names_of_the_contract():
    names = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"}
    for block in range(3):
        for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            names |= {f"blocks.{block}.{layer}.weight", f"blocks.{block}.{layer}.bias"}
    assert set(VisionTransformer(img_size=8, patch_size=4, **TINY).state_dict()) == names


TIMM_NAMES = {
    "tiny": "vit_tiny_patch16_224",
    "small": "vit_small_patch16_224",
    "base": "vit_base_patch16_224",
    "large": "vit_large_patch16_224",
    "huge": "vit_huge_patch14_224",
}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_those_of_timm(size):
    with torch.device("meta"):
        theirs = timm.create_model(TIMM_NAMES[size], num_classes=0)
        shallow = timm.create_model(TIMM_NAMES[size], num_classes=0, depth=1)
    ours = VisionTransformer(size, patch_size=14 if size == "huge" else 16, depth=1)
    assert SIZES[size]["depth"] == len(theirs.blocks)
    assert SIZES[size]["num_heads"] == theirs.blocks[0].attn.num_heads
    assert count(ours) == count(shallow)


def test_base_has_86_million_parameters():
    model = VisionTransformer("base")
    assert count(model) == 85_798_656
    # The position table is kept as a parameter for its name in checkpoints, but is not trained.
    fixed = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert fixed == ["pos_embed"] and model.pos_embed.numel() == 197 * 768


# Patches


@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    patch=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    channels=st.integers(1, 4),
)
def test_patchify_and_back(grid, patch, channels):
    images = random(2, channels, grid[0] * patch[0], grid[1] * patch[1])
    patches = patchify(images, patch)
    assert torch.equal(patches, oracle.patchify(images, patch))
    assert torch.equal(unpatchify(patches, patch, grid), images)


# Positions


@pytest.mark.parametrize("dim, grid", [(16, (3, 3)), (8, (2, 5)), (48, (14, 14)), (4, (1, 1))])
def test_positions_are_the_formula(dim, grid):
    ours = sincos_positions(dim, grid)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, oracle.sincos(dim, grid).float(), atol=1e-6, rtol=0)
    assert not ours[:, 0].any()


def test_positions_are_the_recorded_ones(shared):
    for case in ("pixel", "feature", "feature_clip", "pixel_l1_qd2_linear"):
        with safe_open(shared / f"golden/semaim/{case}.safetensors", "pt") as file:
            recorded = file.get_tensor("param.pos_embed")
        ours = VisionTransformer(embed_dim=recorded.shape[-1], depth=1, num_heads=1).pos_embed
        torch.testing.assert_close(ours.data, recorded, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "table, grid",
    [((8, 12), (16, 18)), ((12, 8), (16, 20)), ((12, 9), (18, 9)), ((6, 16), (9, 20)), ((32, 12), (16, 9))],
)
def test_positions_are_resampled_along_their_own_axis(table, grid):
    model = VisionTransformer(img_size=(table[0] * 4, table[1] * 4), patch_size=4, embed_dim=4, depth=1, num_heads=1)
    row, column = torch.meshgrid(*(torch.arange(n).float() for n in table), indexing="ij")
    model.pos_embed.data[0, 1:] = torch.stack([row, column, 3 * row - column, torch.ones(table)], -1).flatten(0, 1)
    model.pos_embed.data[0, 0] = torch.tensor([5.0, 6.0, 7.0, 8.0])
    resampled = model.positions(grid)
    assert resampled[0, 0].tolist() == [5, 6, 7, 8]
    # A cubic keeps straight lines, except near the border, where its taps leave the table.
    lines = (((torch.arange(n) + 0.5) * side / n - 0.5)[4:-4] for n, side in zip(grid, table, strict=True))
    row, column = torch.meshgrid(*lines, indexing="ij")
    inner = resampled[0, 1:].unflatten(0, grid)[4:-4, 4:-4]
    expected = torch.stack([row, column, 3 * row - column, torch.ones_like(row)], -1)
    torch.testing.assert_close(inner, expected, atol=0.01, rtol=0)


def test_positions_of_the_tables_own_grid_are_the_table():
    model = VisionTransformer(img_size=(12, 20), patch_size=4, **TINY)
    assert torch.equal(model.positions((3, 5)), model.pos_embed)


# Attention


def plain(module):
    return dict(module.named_parameters())


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_softmax_of_products(causal):
    attention, x = randomise(Attention(16, 2)), random(2, 7, 16)
    p = {f"attn.{name}": parameter for name, parameter in plain(attention).items()}
    query, key, value = (layer(x) for layer in oracle.qkv(x, p, "attn"))
    mask = torch.full((7, 7), -torch.inf).triu(1) if causal else 0
    expected = oracle.linear(oracle.attend(query, key, value, 2, mask), p, "attn.proj")
    torch.testing.assert_close(attention(x, causal=causal), expected, atol=1e-5, rtol=1e-5)


def test_attention_to_a_context():
    attention, x, context = randomise(Attention(16, 2)), random(2, 4, 16), random(2, 7, 16, seed=1)
    p = {f"attn.{name}": parameter for name, parameter in plain(attention).items()}
    to_query, to_key, to_value = oracle.qkv(x, p, "attn")
    out = oracle.attend(to_query(x), to_key(context), to_value(context), 2, 0)
    torch.testing.assert_close(attention(x, context), oracle.linear(out, p, "attn.proj"), atol=1e-5, rtol=1e-5)


def test_context_of_itself_is_self_attention():
    attention, x = randomise(Attention(16, 2)), random(2, 7, 16)
    torch.testing.assert_close(attention(x, x, causal=True), attention(x, causal=True))


@pytest.mark.parametrize("kind", [Attention, CrossAttention])
@pytest.mark.parametrize("causal", [False, True])
def test_block_with_a_context_equals_the_oracle(kind, causal):
    block, x, context = randomise(Block(16, 2, attention=kind)), random(2, 7, 16), random(2, 7, 16, seed=1)
    p = {f"b.{name}": parameter for name, parameter in plain(block).items()}
    mask = torch.full((7, 7), -torch.inf).triu(1) if causal else 0
    expected = oracle.block(x, context, p, "b", 2, mask)
    torch.testing.assert_close(block(x, context, causal), expected, atol=1e-4, rtol=1e-4)


def test_class_attention_is_the_first_row_of_the_softmax():
    attention, x = randomise(Attention(16, 2)), random(2, 7, 16)
    p = {f"attn.{name}": parameter for name, parameter in plain(attention).items()}
    query, key, _ = (layer(x) for layer in oracle.qkv(x, p, "attn"))
    first, second = (weights for _, weights in oracle.attention_weights(query, key, 2, 0))
    ours = attention.class_attention(x)
    torch.testing.assert_close(ours, (first + second)[:, 0, 1:] / 2)
    assert (ours.sum(-1) < 1).all()
    assert attention.bfloat16().class_attention(x.bfloat16()).dtype == torch.float32


def test_forward_with_attention_equals_forward_and_the_oracle():
    model, images = randomise(VisionTransformer(img_size=(8, 12), patch_size=4, **TINY)), random(2, 3, 8, 12)
    tokens, attention = model.forward_with_attention(images)
    assert torch.equal(tokens, model(images))
    expected = oracle.tokens(images, plain(model), patch=(4, 4), depth=3, heads=2)
    torch.testing.assert_close(tokens, expected[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(attention, expected[1], atol=1e-5, rtol=1e-4)


# Options


def test_drop_path_rises_linearly():
    blocks = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=5, num_heads=2, drop_path_rate=0.2).blocks
    rates = [getattr(block.drop_path, "drop_prob", 0) for block in blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_drop_path_is_off_in_eval_mode_and_on_in_training():
    torch.manual_seed(0)
    model, images = VisionTransformer(img_size=8, patch_size=4, drop_path_rate=0.5, **TINY), random(4, 3, 8, 8)
    assert torch.equal(model.eval()(images), model(images))
    assert not torch.equal(model.train()(images), model(images))


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_checkpointing_changes_neither_output_nor_gradient(drop_path):
    results = []
    for with_cp in (False, True):
        options = dict(img_size=8, patch_size=4, drop_path_rate=drop_path, with_cp=with_cp, **TINY)
        model = randomise(VisionTransformer(**options)).train()
        torch.manual_seed(0)
        out = model(random(4, 3, 8, 8))
        out.square().sum().backward()
        results.append([out, *(p.grad for p in model.parameters() if p.requires_grad)])
    for plain_result, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain_result, atol=0, rtol=1e-6)


def test_start_is_that_of_mae():
    torch.manual_seed(0)
    model = VisionTransformer("tiny", depth=1)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for weight in [*(linear.weight for linear in linears), model.patch_embed.proj.weight.flatten(1)]:
        bound = (6 / sum(weight.shape)) ** 0.5
        assert 0.99 * bound < weight.abs().max() <= bound
    assert not any(linear.bias.any() for linear in linears)
    bias = model.patch_embed.proj.bias  # that of a convolution which reads 16 x 16 x 3 values
    assert 0.95 / 768**0.5 < bias.abs().max() <= 1 / 768**0.5
    assert bias.mean().abs() < 0.2 / 768**0.5 and bias.std().item() == pytest.approx((3 * 768) ** -0.5, rel=0.2)
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)


# Errors


@pytest.mark.parametrize("image", [(8, 10), (10, 8), (2, 8), (8, 0)])
def test_images_that_the_patch_does_not_divide(image):
    model = VisionTransformer(img_size=8, patch_size=4, **TINY)
    with pytest.raises(ValueError, match=f"{image[0]} x {image[1]} pixels.*4 x 4 patches"):
        model(random(1, 3, *image))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(size="gigantic"), "gigantic.*tiny, small, base, large, huge"),
        (dict(embed_dim=16, num_heads=3), "16 .*3 heads"),
        (dict(embed_dim=6, num_heads=1), "divisible by 4, got 6"),
        (dict(img_size=30, patch_size=4), "30 x 30 pixels"),
    ],
)
def test_wrong_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        VisionTransformer(**(dict(img_size=8, patch_size=4, depth=1) | wrong))
