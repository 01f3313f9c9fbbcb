"""The segmentation encoder: mmseg's own backbone with the same weights, bias tables, sizes, layer scale."""

import pytest
import torch
import torch.nn.functional as F
from operations import Operations

from semaim import checkpoints
from semaim.models.segvit import SegmentationViT, SpreadBias, bias_index, resize_bias
from semaim.models.vit import VisionTransformer

SMALL = {"embed_dim": 32, "depth": 4, "num_heads": 2, "patch_size": 8}


def random_weights(model):
    """Large enough that every mistake shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def test_maps_are_those_of_mmsegs_mae():
    pytest.importorskip("mmseg", reason="mmsegmentation is not installed: runs after tools/setup.sh --extras all")
    from semaim import compat

    compat.install()
    from mmseg.models.backbones import MAE

    theirs = MAE(
        img_size=(32, 48), patch_size=8, embed_dims=32, num_layers=4, num_heads=2, init_values=1.0,
        out_indices=[0, 1, 3], norm_cfg={"type": "LN", "eps": 1e-6},
    )  # fmt: skip
    theirs.eval()  # returns nothing
    ours = random_weights(SegmentationViT(img_size=(32, 48), out_blocks=(0, 1, 3), layer_scale=1.0, **SMALL))
    state = {}
    for name, tensor in ours.state_dict().items():
        for mine, other in {
            "blocks.": "layers.", "norm1": "ln1", "norm2": "ln2", "mlp.fc1": "ffn.layers.0.0",
            "mlp.fc2": "ffn.layers.1", "patch_embed.proj": "patch_embed.projection",
            "rel_bias": "relative_position_bias_table",
        }.items():  # fmt: skip
            name = name.replace(mine, other)
        state[name] = tensor
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("relative_position_index") for name in missing)
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        for mine, other in zip(ours(images), theirs(images), strict=True):
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def test_bias_index_against_its_definition():
    index, (height, width) = bias_index((3, 4), torch.device("cpu")), (3, 4)
    offsets = (2 * height - 1) * (2 * width - 1)
    for i in range(12):
        for j in range(12):
            down, right = i // width - j // width, i % width - j % width
            assert index[1 + i, 1 + j] == (down + height - 1) * (2 * width - 1) + right + width - 1
    assert (index[0, 1:] == offsets).all() and (index[1:, 0] == offsets + 1).all() and index[0, 0] == offsets + 2


def test_without_bias_and_scale_it_is_the_plain_encoder():
    plain = random_weights(VisionTransformer(img_size=(40, 24), **SMALL))
    images = torch.randn(2, 3, 40, 24)
    tokens = plain.embed(images)
    maps = []
    for block in plain.blocks:
        tokens = block(tokens)
        maps.append(tokens[:, 1:].transpose(1, 2).reshape(2, 32, 5, 3))
    for options in ({"rel_bias": False}, {"rel_bias": True}, {"rel_bias": True, "layer_scale": 1.0}):
        model = SegmentationViT(img_size=(40, 24), **SMALL, **options).eval()
        missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
        assert set(unexpected) == {"norm.weight", "norm.bias"} and model.out_blocks == (0, 1, 2, 3)
        assert {name.split(".")[-1] for name in missing} <= {"rel_bias", "gamma_1", "gamma_2"}
        with torch.no_grad():
            for found, expected in zip(model(images), maps, strict=True):
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_images_of_no_whole_number_of_patches_are_stretched():
    model = random_weights(SegmentationViT(img_size=32, **SMALL))
    images = torch.randn(1, 3, 30, 41)
    with torch.no_grad():
        found = model(images)
        stretched = torch.nn.functional.interpolate(images, (32, 48), mode="bilinear", align_corners=False)
        expected = model(stretched)
    assert found[0].shape == (1, 32, 4, 6) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_tables_are_resized_for_other_grids():
    table = torch.randn(7 * 7 + 3, 2)
    assert resize_bias(table, (4, 4), (4, 4)) is table
    wide = resize_bias(table, (4, 4), (4, 8))
    assert wide.shape == (7 * 15 + 3, 2) and torch.equal(wide[-3:], table[-3:])
    expected = F.interpolate(table[:-3].reshape(7, 7, 2).permute(2, 0, 1)[None], (7, 15), mode="bicubic")[0]
    torch.testing.assert_close(wide[:-3], expected.permute(1, 2, 0).reshape(-1, 2))
    # The offset zero stands in the middle, whatever the grid: a bias that is a peak there stays one.
    peak = torch.zeros(7 * 7 + 3, 1)
    peak[24] = 1
    resized = resize_bias(peak, (4, 4), (6, 6))[:-3]
    assert resized.argmax() == (11 * 11) // 2


def test_every_part_matters_and_gets_a_gradient():
    model = random_weights(SegmentationViT(img_size=32, layer_scale=0.5, **SMALL))
    images = torch.randn(1, 3, 32, 32)
    before = [m.detach() for m in model(images)]
    sum(m.square().mean() for m in model(images)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in model.named_parameters()), [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()
    ]
    with torch.no_grad():
        model.blocks[1].attn.rel_bias += torch.randn_like(model.blocks[1].attn.rel_bias)
        after = model(images)
    torch.testing.assert_close(before[0], after[0], atol=1e-5, rtol=1e-4)
    assert (before[1] - after[1]).abs().max() > 0.01


def test_recomputing_activations_changes_nothing():
    images = torch.randn(1, 3, 32, 32)
    gradients = []
    for with_cp in (False, True):
        model = random_weights(SegmentationViT(img_size=32, layer_scale=0.5, with_cp=with_cp, **SMALL)).train()
        sum(m.square().mean() for m in model(images)).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def resized(table, old, new):
    """A position table on another grid, the class token's row as it is: bicubic, not antialiased."""
    patches = table[:, 1:].reshape(1, *old, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, new, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    return torch.cat([table[:, :1], patches], dim=1)


def test_a_pretrained_encoder_flows_in_and_its_positions_are_resized_once(pretrained):
    model = SegmentationViT(img_size=64, embed_dim=32, depth=2, num_heads=2, patch_size=8, layer_scale=1.0)
    report = checkpoints.load(model, pretrained, expected=("rel_bias", "gamma_1", "gamma_2"))
    assert not report.missing and len(report.new) == 6 and len(report.matched) == 28
    assert model.get_layer_depth("blocks.1.attn.rel_bias") == (2, 4)
    assert report.resized == ["pos_embed (1, 17, 32) -> (1, 65, 32)"] and model.pos_embed.requires_grad
    table = checkpoints.read(pretrained).state["pos_embed"]
    torch.testing.assert_close(model.pos_embed.data, resized(table, (4, 4), (8, 8)))
    images = torch.randn(1, 3, 48, 80)
    tokens = model.patch_embed(images) + resized(model.pos_embed.data, (8, 8), (6, 10))[:, 1:]
    torch.testing.assert_close(model.embed(images)[:, 1:], tokens)


def test_blocks_of_the_published_sizes():
    with torch.device("meta"):
        assert SegmentationViT("base").out_blocks == (3, 5, 7, 11)
        assert SegmentationViT("large").out_blocks == (5, 11, 17, 23)
    with pytest.raises(ValueError, match=r"out_blocks \(4,\): there are blocks 0 to 3"):
        SegmentationViT(out_blocks=(4,), **SMALL)


def gathered(table, grid, dtype):
    """The bias by its definition: a row of the table for every pair, which autograd adds up."""
    return table[bias_index(grid, table.device)].permute(2, 0, 1).to(dtype)


@pytest.mark.parametrize("made_for, grid", [((4, 4), (4, 4)), ((3, 5), (3, 5)), ((1, 6), (1, 6)), ((4, 4), (7, 5))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_bias_and_its_gradient_are_those_of_the_gathered_table(made_for, grid, dtype):
    torch.manual_seed(0)
    rows = (2 * made_for[0] - 1) * (2 * made_for[1] - 1) + 3
    table = torch.randn(rows, 3, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    tokens = 1 + grid[0] * grid[1]
    probe = torch.randn(3, tokens, tokens).to(dtype)
    results = []
    for form in (SpreadBias.apply, gathered):
        bias = form(resize_bias(table, made_for, grid), grid, dtype)
        results.append((bias, *torch.autograd.grad(bias, table, probe)))
    (ours, mine), (expected, wanted) = results
    assert torch.equal(ours, expected) and ours.is_contiguous() and ours.dtype == dtype
    assert (mine - wanted).norm() <= (1e-14 if dtype == torch.float64 else 1e-6) * wanted.norm()


def test_a_step_neither_sorts_nor_scatters_the_bias():
    model = random_weights(SegmentationViT(img_size=32, **SMALL))
    with Operations() as seen:
        sum(m.square().mean() for m in model(torch.randn(1, 3, 32, 32))).backward()
    assert seen.counts["index_select"] == seen.counts["col2im"] == 4  # one for each block
    assert not {"index", "index_put", "_index_put_impl_", "index_put_", "sort"} & set(seen.counts)
