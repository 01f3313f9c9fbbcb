"""MAE: equal to a masked oracle in loss and gradient, blind to what was removed, with the reference's names."""

import json
import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from semaim.models import MAE, FeatureTarget, PixelTarget, SemAIM, VisionTransformer

#: patches (rows, columns) and patch (height, width)
SHAPES = [((3, 3), (4, 4)), ((5, 7), (4, 4)), ((4, 2), (8, 8)), ((2, 3), (8, 4)), ((1, 5), (4, 4))]
DEPTH, HEADS, DECODER_DEPTH, DECODER_HEADS = 3, 2, 2, 3


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def images_of(grid, patch=(4, 4), batch=2, seed=0):
    return random(batch, 3, grid[0] * patch[0], grid[1] * patch[1], seed=seed)


def start(grid=(3, 4), patch=(4, 4), target=None, **options):
    """A small model as it is made."""
    size = dict(embed_dim=16, depth=DEPTH, num_heads=HEADS, patch_size=patch)
    size |= dict(decoder_embed_dim=12, decoder_depth=DECODER_DEPTH, decoder_num_heads=DECODER_HEADS)
    size["img_size"] = (grid[0] * patch[0], grid[1] * patch[1])
    return MAE(target or PixelTarget(patch, blur_kernel=0), **(size | options))


def build(*args, **options):
    """A small model with every parameter away from its special start."""
    torch.manual_seed(7)
    model = start(*args, **options)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * (0.02 if "weight" in name and parameter.dim() > 1 else 0.2)
    return model


def plain(module):
    return dict(module.named_parameters())


def gradients(model, loss):
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, trained.values()), strict=True))


# The oracle: one image after another, every patch goes through the encoder, and a mask says which are seen.


def oracle_image(image, numbers, p, patch, ratio):
    """One image (1, 3, H, W) -> latent (1 + K, D), prediction (L, width), indices of the removed patches."""
    ranking = sorted(range(len(numbers)), key=lambda i: numbers[i])
    count = int(len(numbers) * (1 - ratio))
    kept, removed = ranking[:count], ranking[count:]
    seen = [True] + [i in kept for i in range(len(numbers))]
    mask = torch.tensor([0.0 if visible else -math.inf for visible in seen], dtype=image.dtype)
    x = oracle.embed(image, p, patch)
    for index in range(DEPTH):
        x = oracle.block(x, x, p, f"blocks.{index}", HEADS, mask)
    x = oracle.norm(x, p, "norm")
    decoded = oracle.linear(x, p, "decoder_embed")
    rows = [decoded[0, n] if visible else p["mask_token"][0, 0] for n, visible in enumerate(seen)]
    y = torch.stack(rows)[None] + p["decoder_pos_embed"]
    for index in range(DECODER_DEPTH):
        y = oracle.block(y, y, p, f"decoder_blocks.{index}", DECODER_HEADS, 0)
    prediction = oracle.linear(oracle.norm(y, p, "decoder_norm"), p, "decoder_pred")
    return x[0, [0] + [1 + i for i in kept]], prediction[0, 1:], removed


def oracle_step(images, draw, p, patch, ratio=0.75, norm_pix=True):
    """A batch -> loss, loss_map (B, L), prediction (B, L, width), mask (B, L), latents."""
    images_one_by_one = [
        oracle_image(image[None], numbers, p, patch, ratio)
        for image, numbers in zip(images, draw.tolist(), strict=True)
    ]
    prediction = torch.stack([prediction for _, prediction, _ in images_one_by_one])
    loss_map = oracle.pixel_loss(prediction, oracle.pixel_target(images, patch, 0, norm_pix=norm_pix))
    mask, fallen = torch.zeros_like(loss_map), []
    for b, (_, _, removed) in enumerate(images_one_by_one):
        for i in removed:
            mask[b, i] = 1
            fallen.append(loss_map[b, i])
    return sum(fallen) / len(fallen), loss_map, prediction, mask, [latent for latent, _, _ in images_one_by_one]


def assert_equals_oracle(model, images, ratio=0.75, norm_pix=True):
    """One training step against the oracle: mask, latent, prediction, loss, every gradient."""
    patch = model.patch_size
    draw = uniform(len(images), math.prod(model.grid_of(images.shape[-2:])))
    out = model.train()(images, draw)
    loss, loss_map, prediction, mask, latents = oracle_step(images, draw, plain(model), patch, ratio, norm_pix)
    latent = model.encode(images, model.remove(draw)[0])
    torch.testing.assert_close(latent, torch.stack(latents), atol=1e-4, rtol=1e-4)
    assert torch.equal(out.mask, mask)
    torch.testing.assert_close(out.target, oracle.pixel_target(images, patch, 0, norm_pix=norm_pix))
    torch.testing.assert_close(out.prediction, prediction, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.loss_map, loss_map, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.loss, loss, atol=1e-5, rtol=0)

    ours, expected = gradients(model, out.loss), gradients(model, loss)
    whole = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        # Key biases have no gradient (softmax does not see them), so what is there is rounding.
        assert (ours[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6 * whole, name
        if not name.endswith("qkv.bias"):
            assert gradient.norm() > 1e-4 * whole, f"{name} is not trained"


@pytest.mark.parametrize("grid, patch", SHAPES)
@pytest.mark.parametrize("ratio", [0.75, 0.4])
def test_step_equals_the_oracle(grid, patch, ratio):
    assert_equals_oracle(build(grid, patch, mask_ratio=ratio), images_of(grid, patch, batch=3), ratio)


@pytest.mark.parametrize("with_cp", [False, True])
@pytest.mark.parametrize("norm_pix", [False, True])
def test_step_equals_the_oracle_for_every_option(norm_pix, with_cp):
    model = build(target=PixelTarget((4, 4), blur_kernel=0, norm_pix=norm_pix), with_cp=with_cp)
    assert_equals_oracle(model, images_of((3, 4)), norm_pix=norm_pix)


def test_image_of_another_size_than_the_table():
    model, images, grid = build((3, 4)), images_of((5, 2)), (5, 2)
    out = model(images, draw := uniform(2, 10))
    p = plain(model)
    for name in ("pos_embed", "decoder_pos_embed"):
        table = p[name][:, 1:].unflatten(1, (3, 4)).permute(0, 3, 1, 2)
        table = F.interpolate(table, grid, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
        p[name] = torch.cat([p[name][:, :1], table], dim=1)
    loss, _, prediction, mask, _ = oracle_step(images, draw, p, (4, 4))
    assert torch.equal(out.mask, mask)
    torch.testing.assert_close(out.prediction, prediction, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.loss, loss, atol=1e-5, rtol=0)


# What is removed


@pytest.mark.parametrize(
    "length, ratio, kept", [(196, 0.75, 49), (196, 0.6, 78), (35, 0.75, 8), (4, 0.75, 1), (5, 0.2, 4)]
)
def test_as_many_patches_stay_as_the_ratio_says(length, ratio, kept):
    model = start(mask_ratio=ratio)
    draw = uniform(3, length)
    indices, place, mask = model.remove(draw)
    assert indices.shape == (3, kept) and (mask.sum(1) == length - kept).all()
    for b in range(3):
        smallest = sorted(range(length), key=lambda i: draw[b, i].item())
        assert indices[b].tolist() == smallest[:kept]
        assert [place[b, i].item() for i in smallest] == list(range(length))
        assert {i for i in range(length) if mask[b, i] == 0} == set(smallest[:kept])


def test_equal_numbers_keep_the_image_order():
    kept, place, _ = start(mask_ratio=0.5).remove(torch.zeros(1, 100))
    assert kept[0].tolist() == list(range(50)) and place[0].tolist() == list(range(100))


def test_draw_repeats_and_is_made_where_none_is_given():
    model, images = build(), images_of((3, 4))
    first, again, other = (model(images, uniform(2, 12, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first.prediction, again.prediction) and torch.equal(first.loss, again.loss)
    assert not torch.equal(first.mask, other.mask)
    masks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        masks.append(model(images).mask)
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0][0], masks[0][1])


def test_removed_patches_influence_neither_latent_nor_prediction():
    model, images, draw = build().double().eval(), images_of((3, 4)).double(), uniform(2, 12)
    kept, place, mask = model.remove(draw)
    patches = mask.unflatten(1, (3, 4)).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    latent, prediction = model.encode(images, kept), model(images, draw).prediction
    noise = random(*images.shape, seed=3).double() * 5
    for where, changes in ((patches, False), (1 - patches, True)):
        changed = images + noise * where
        for before, after in (latent, model.encode(changed, kept)), (prediction, model(changed, draw).prediction):
            difference = (before - after).abs().amax(-1)
            assert (difference.min() > 1e-6) if changes else (difference.max() < 1e-12)

    images.requires_grad_()
    model.decode(model.encode(images, kept), place, (3, 4)).square().sum().backward()
    by_patch = oracle.patchify(images.grad, (4, 4)).norm(dim=-1)
    assert (by_patch[mask == 1] == 0).all() and (by_patch[mask == 0] > 0).all()


def test_encoder_blocks_see_kept_patches_only():
    model, lengths = build(), {"blocks": [], "decoder_blocks": []}
    for name, seen in lengths.items():
        for block in getattr(model, name):
            block.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].shape[1]))
    model(images_of((3, 4)))
    assert lengths == {"blocks": [1 + 3] * DEPTH, "decoder_blocks": [1 + 12] * DECODER_DEPTH}


def test_loss_falls_on_removed_patches_of_the_whole_batch():
    out = build()(images_of((3, 4), batch=3), uniform(3, 12))
    assert set(out.mask.unique().tolist()) == {0.0, 1.0} and (out.mask.sum(1) == 9).all()
    torch.testing.assert_close(out.loss, out.loss_map[out.mask == 1].mean())
    assert (out.loss - out.loss_map.mean()).abs() > 1e-3


def test_images_of_a_batch_are_independent():
    model, images, draw = build().eval(), images_of((3, 4), batch=3), uniform(3, 12)
    together = model(images, draw)
    for index in range(3):
        alone = model(images[index, None], draw[index, None])
        torch.testing.assert_close(alone.prediction[0], together.prediction[index], atol=1e-5, rtol=1e-5)
        assert torch.equal(alone.mask[0], together.mask[index])


# Training


def test_positions_are_not_trained():
    model = build()
    model(images_of((3, 4))).loss.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {"pos_embed", "decoder_pos_embed"}
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == without


def test_drop_path_is_the_encoders_and_in_training_only():
    images, draw = images_of((3, 4), batch=4), uniform(4, 12)
    model, without = build(drop_path_rate=0.5), build()
    assert torch.equal(model.eval()(images, draw).prediction, without.eval()(images, draw).prediction)
    model.train()
    torch.manual_seed(0)
    latents = [model.encode(images, model.remove(draw)[0]) for _ in range(2)]
    assert not torch.equal(*latents)
    place = model.remove(draw)[1]
    assert torch.equal(*(model.decode(latents[0], place, (3, 4)) for _ in range(2)))


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_checkpointing_changes_neither_loss_nor_gradient(drop_path):
    images, draw, results = images_of((3, 4), batch=4), uniform(4, 12), []
    for with_cp in (False, True):
        model = build(drop_path_rate=drop_path, with_cp=with_cp).train()
        assert all(block.with_cp == with_cp for block in [*model.blocks, *model.decoder_blocks])
        torch.manual_seed(0)
        out = model(images, draw)
        results.append({"prediction": out.prediction, **gradients(model, out.loss)})
    for name, result in results[0].items():
        torch.testing.assert_close(results[1][name], result, atol=1e-8, rtol=1e-5, msg=name)


def test_bfloat16_gives_nearly_the_same_loss():
    model, images, draw = build(), images_of((3, 4)), uniform(2, 12)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images, draw)
    out.loss.backward()
    assert out.loss.dtype == out.loss_map.dtype == torch.float32
    assert 0 < (out.loss - model(images, draw).loss).abs() < 0.02


def test_initialisation():
    torch.manual_seed(0)
    model = start(embed_dim=64, num_heads=2, decoder_embed_dim=96)
    for token in (model.mask_token, model.cls_token):
        assert 0.01 < token.std() < 0.03
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 4 * (DEPTH + DECODER_DEPTH) + 2
    for linear in linears:
        bound = math.sqrt(6 / (linear.in_features + linear.out_features))
        assert (linear.bias == 0).all() and 0.9 * bound < linear.weight.abs().max() <= bound
    assert all(module.eps == 1e-6 for module in model.modules() if isinstance(module, nn.LayerNorm))
    for table, dim in ((model.pos_embed, 64), (model.decoder_pos_embed, 96)):
        torch.testing.assert_close(table, oracle.sincos(dim, (3, 4)).float(), atol=1e-6, rtol=0)


# Names


def test_encoder_has_the_names_of_the_encoder_and_of_semaim():
    mae, encoder = (
        {name: tensor.shape for name, tensor in model.state_dict().items()}
        for model in (start(), VisionTransformer(img_size=(12, 16), patch_size=4, embed_dim=16, depth=3, num_heads=2))
    )
    semaim = SemAIM(PixelTarget((4, 4)), img_size=(12, 16), patch_size=4, embed_dim=16, depth=3, num_heads=2)
    own = {name for name in mae if name.startswith(("decoder_", "mask_token"))}
    assert encoder.items() < mae.items() and set(mae) - own == set(encoder) and own
    shared = {name for name in semaim.state_dict() if not name.startswith(("query_blocks", "prediction_head"))}
    assert shared == set(encoder)


def test_names_and_shapes_are_the_recorded_ones(shared):
    meta = json.loads((shared / "golden/mae/mae.json").read_text())
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
    names += ("decoder_embed_dim", "decoder_depth", "decoder_num_heads")
    model = MAE(PixelTarget((16, 16), blur_kernel=0), **{name: meta["config"][name] for name in names})
    recorded = {n.removeprefix("param."): t["shape"] for n, t in meta["tensors"].items() if n.startswith("param.")}
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == recorded


def test_defaults_are_those_of_the_published_model():
    with torch.device("meta"):
        model = MAE(PixelTarget((16, 16), blur_kernel=0))
    assert model.mask_ratio == 0.75 and model.mask_token.shape[-1] == 512
    assert len(model.decoder_blocks) == 8 and model.decoder_blocks[0].attn.num_heads == 16
    trained = sum(parameter.numel() for parameter in model.parameters())
    assert trained == 111_907_840  # mae_vit_base_patch16, position tables included


# Against the records


def test_every_recorded_result_is_compared(shared):
    from semaim.parity import FAMILIES
    from semaim.parity.cases import Case, run_case

    case = Case(shared / "golden/mae/mae.json")
    report = run_case(case, FAMILIES["mae"])
    assert report.passed and not report.deviations
    results = {name for name in case.tensors if not name.startswith("param.") and name != "noise"}
    results |= {"param.pos_embed", "param.decoder_pos_embed", *case.scalars} - {"grad_l2_norm_fp64"}
    results |= {f"grad_l2_norm_fp64.{name}" for name in case.scalars["grad_l2_norm_fp64"]}
    assert {check.name for check in report.checks} == results


# Errors


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(mask_ratio=0), "mask_ratio 0 is no share"),
        (dict(mask_ratio=1.0), "mask_ratio 1.0 is no share"),
        (dict(mask_ratio=75), "mask_ratio 75 is no share"),
        (dict(mask_ratio=float("nan")), "mask_ratio nan is no share"),
        (dict(mask_ratio=0.95), "keeps 0 of 12 patches"),
        (dict(mask_ratio=1e-20), "keeps 12 of 12 patches"),
        (dict(target=PixelTarget((8, 2), blur_kernel=0)), r"\(8, 2, 3\), the encoder's \(4, 4, 3\)"),
        (dict(target=PixelTarget((4, 4), in_chans=1, blur_kernel=0)), r"\(4, 4, 1\), the encoder's \(4, 4, 3\)"),
        (dict(target=FeatureTarget(48)), "PixelTarget, not a FeatureTarget"),
        (dict(decoder_depth=0), "decoder_depth 0"),
        (dict(decoder_num_heads=5), "12 cannot be split into 5 heads"),
        (dict(decoder_embed_dim=6), "divisible by 4, got 6"),
        (dict(img_size=30), "30 x 30 pixels"),
    ],
)
def test_wrong_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        start(**wrong)


def test_images_that_do_not_fit():
    with pytest.raises(ValueError, match="12 x 15 pixels"):
        build()(random(1, 3, 12, 15))
    with pytest.raises(ValueError, match="keeps 0 of 2 patches"):
        build()(images_of((1, 2)))
