"""The two-stream model: equal to the masked oracle in loss and gradient, causal, and led by its guide."""

import itertools
import json

import oracle
import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn

from semaim.models import FeatureTarget, PixelTarget, SemAIM, Teacher, VisionTransformer
from semaim.models.ordering import ORDERS, SEMANTIC_ORDERS, make_order, similarity_map

#: patches (rows, columns) and patch (height, width)
SHAPES = [((3, 3), (4, 4)), ((5, 7), (4, 4)), ((4, 2), (8, 8)), ((2, 3), (8, 4)), ((1, 1), (4, 4))]
DEPTH, HEADS = 4, 2


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images_of(grid, patch, batch=2, seed=0):
    return random(batch, 3, grid[0] * patch[0], grid[1] * patch[1], seed=seed)


def build(grid=(3, 4), patch=(4, 4), target=None, **options):
    """A small model with every parameter away from its special start."""
    torch.manual_seed(7)
    size = dict(embed_dim=16, depth=DEPTH, num_heads=HEADS, patch_size=patch)
    size["img_size"] = (grid[0] * patch[0], grid[1] * patch[1])
    model = SemAIM(target or PixelTarget(patch), **(size | options))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * (0.02 if "weight" in name and parameter.dim() > 1 else 0.2)
    return model


def plain(module):
    return dict(module.named_parameters())


def oracle_tokens(model, images):
    """The unmasked pass of a model or encoder: tokens and class attention."""
    return oracle.tokens(images, plain(model), patch=model.patch_size, depth=model.depth, heads=model.num_heads)


def oracle_prediction(model, images, key, head="mlp"):
    return oracle.predict(
        images,
        plain(model),
        key,
        patch=model.patch_size,
        depth=model.depth,
        heads=model.num_heads,
        decoder_depth=model.depth // model.step,
        head=head,
        share_weights=not model.query_blocks,
    )


def gradients(model, loss):
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, trained.values()), strict=True))


def assert_equals_oracle(model, images, head="mlp"):
    """One training step against the oracle: similarity, order, target, prediction, loss, every gradient."""
    grid = model.grid_of(images.shape[-2:])
    draw = torch.rand(len(images), grid[0] * grid[1], generator=torch.Generator().manual_seed(1))
    out = model.train()(images, draw)
    with torch.no_grad():
        tokens, attention = oracle_tokens(model, images)
    if out.similarity is not None:
        similarity = attention if model.similarity == "self" else oracle.similarity(tokens, model.similarity)
        torch.testing.assert_close(out.similarity, similarity, atol=1e-5, rtol=1e-4)
    assert torch.equal(out.order, make_order(model.order, out.similarity, grid, draw))

    prediction = oracle_prediction(model, images, oracle.rank_of(out.order), head)
    if isinstance(model.target, FeatureTarget):
        loss_map = oracle.feature_loss(prediction, tokens)
    else:
        loss_map = oracle.pixel_loss(prediction, oracle.pixel_target(images, model.patch_size))
    torch.testing.assert_close(out.prediction, prediction, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.loss_map, loss_map, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.loss, loss_map.mean(), atol=1e-5, rtol=0)

    ours, expected = gradients(model, out.loss), gradients(model, loss_map.mean())
    whole = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        # Key biases have no gradient (softmax does not see them), so what is there is rounding.
        assert (ours[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6 * whole, name


@pytest.mark.parametrize("grid, patch", SHAPES)
@pytest.mark.parametrize("order", ORDERS)
def test_step_equals_the_oracle_for_every_order(order, grid, patch):
    assert_equals_oracle(build(grid, patch, order=order), images_of(grid, patch))


OPTIONS = list(itertools.product((1, 2, 4), ("mlp", "linear"), (False, True), (False, True), ("pixel", "feature")))


@pytest.mark.parametrize("decoder_depth, head, share_weights, with_cp, target", OPTIONS)
def test_step_equals_the_oracle_for_every_option(decoder_depth, head, share_weights, with_cp, target):
    model = build(
        target=FeatureTarget() if target == "feature" else None,
        decoder_depth=decoder_depth,
        head=head,
        share_weights=share_weights,
        with_cp=with_cp,
    )
    assert_equals_oracle(model, images_of((3, 4), (4, 4)), head)


@pytest.mark.parametrize("similarity", ["cls", "gap", "self"])
@pytest.mark.parametrize("target", [None, FeatureTarget()], ids=["pixel", "feature"])
def test_step_equals_the_oracle_for_every_similarity(similarity, target):
    assert_equals_oracle(build(target=target, similarity=similarity), images_of((3, 4), (4, 4)))


def test_shared_weights_have_no_query_blocks():
    shared, own = build(share_weights=True), build()
    assert not any(name.startswith("query_blocks") for name in shared.state_dict())
    blocks = sum(parameter.numel() for parameter in own.query_blocks.parameters())
    assert sum(p.numel() for p in own.parameters()) - sum(p.numel() for p in shared.parameters()) == blocks > 0


@pytest.mark.parametrize("share_weights", [False, True])
@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_checkpointing_changes_neither_loss_nor_gradient(drop_path, share_weights):
    images, draw, results = images_of((3, 4), (4, 4), batch=4), torch.rand(4, 12), []
    for with_cp in (False, True):
        model = build(drop_path_rate=drop_path, with_cp=with_cp, share_weights=share_weights).train()
        torch.manual_seed(0)
        out = model(images, draw)
        results.append({"prediction": out.prediction, **gradients(model, out.loss)})
    for name, result in results[0].items():
        torch.testing.assert_close(results[1][name], result, atol=1e-8, rtol=1e-5, msg=name)


# Who sees what


def orders_of(grid, batch):
    """A batch of one random order."""
    order = torch.randperm(grid[0] * grid[1], generator=torch.Generator().manual_seed(2))
    return order.expand(batch, -1)


@pytest.mark.parametrize("grid, patch", SHAPES[:4])
@pytest.mark.parametrize("decoder_depth, share_weights", [(4, False), (2, False), (1, True)])
def test_a_patch_is_seen_by_all_later_predictions_and_no_other(grid, patch, decoder_depth, share_weights):
    model = build(grid, patch, decoder_depth=decoder_depth, share_weights=share_weights).double().eval()
    length = grid[0] * grid[1]
    order = orders_of(grid, length)
    images = images_of(grid, patch, batch=1).double().expand(length, -1, -1, -1)
    changed = images.clone()
    for k, index in enumerate(order[0].tolist()):  # image k differs in the patch predicted k-th
        top, left = index // grid[1] * patch[0], index % grid[1] * patch[1]
        changed[k, :, top : top + patch[0], left : left + patch[1]] = random(3, *patch, seed=3).double() * 5
    with torch.no_grad():
        difference = (model.predict(images, order) - model.predict(changed, order)).abs().amax(-1)
    differs = difference.gather(1, order)  # [k, j]: did the j-th prediction change?
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    assert differs[~later].max() < 1e-12
    assert differs[later].min() > 1e-6


def test_no_gradient_reaches_a_patch_from_itself_or_from_earlier_predictions():
    model, order = build().eval(), orders_of((3, 4), 1)
    for k in range(12):
        images = images_of((3, 4), (4, 4), batch=1).requires_grad_()
        model.predict(images, order)[0, order[0, k]].square().sum().backward()
        by_patch = oracle.patchify(images.grad, (4, 4))[0].norm(dim=-1)[order[0]]
        assert (by_patch[k:] == 0).all() and (by_patch[:k] > 0).all()


def test_first_prediction_knows_its_place_and_no_pixel():
    model = build().eval()
    order = torch.stack([torch.arange(12), torch.arange(12), torch.arange(12).roll(-3)])
    images = torch.cat([images_of((3, 4), (4, 4), seed=1), images_of((3, 4), (4, 4), batch=1, seed=2)])
    prediction = model.predict(images, order)
    torch.testing.assert_close(prediction[0, 0], prediction[1, 0], atol=1e-6, rtol=0)
    assert (prediction[0, 0] - prediction[2, 3]).abs().max() > 1e-3
    assert (prediction[0, 1] - prediction[1, 1]).abs().max() > 1e-3


def test_images_of_a_batch_are_independent():
    model, images, draw = build().eval(), images_of((3, 4), (4, 4), batch=3), torch.rand(3, 12)
    together = model(images, draw)
    for index in range(3):
        alone = model(images[index, None], draw[index, None])
        assert torch.equal(alone.order[0], together.order[index])
        torch.testing.assert_close(alone.prediction[0], together.prediction[index], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.loss_map[0], together.loss_map[index], atol=1e-5, rtol=1e-5)


def test_image_of_another_size_than_the_table():
    model, images = build(grid=(3, 4)), images_of((5, 2), (4, 4))
    out = model(images)
    resized = build(grid=(5, 2))
    resized.load_state_dict(model.state_dict() | {"pos_embed": model.positions((5, 2))})
    expected = oracle_prediction(resized, images, oracle.rank_of(out.order))
    torch.testing.assert_close(out.prediction, expected, atol=1e-4, rtol=1e-4)


def test_draw_is_made_where_none_is_given():
    model, images = build(order="stochastic"), images_of((3, 4), (4, 4))
    orders = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        orders.append(model(images).order)
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0][0], orders[0][1])


def test_no_look_where_nothing_needs_it(monkeypatch):
    def look(self, images):
        raise AssertionError("looked at the image")

    monkeypatch.setattr(SemAIM, "look", look)
    for order in sorted(set(ORDERS) - SEMANTIC_ORDERS):
        assert build(order=order)(images_of((3, 4), (4, 4))).similarity is None
    for options in (dict(order="semantic"), dict(order="raster", target=FeatureTarget())):
        with pytest.raises(AssertionError, match="looked"):
            build(**options)(images_of((3, 4), (4, 4)))


# Looking


@pytest.mark.parametrize("guide", ["online", "ema"])
@pytest.mark.parametrize("similarity", ["cls", "self"])
@pytest.mark.parametrize("training", [True, False])
def test_look_has_no_drop_path_no_gradient_and_restores_the_mode(guide, similarity, training):
    model = build(drop_path_rate=0.9, guide=guide, similarity=similarity).train(training)
    images = images_of((3, 4), (4, 4))
    tokens, map_ = model.look(images)
    assert all(module.training == training for module in model.modules())
    assert not tokens.requires_grad and not map_.requires_grad
    expected = oracle_tokens(model.ema if guide == "ema" else model, images)[0]
    torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="no whole number"):
        model.look(images[..., 1:])
    assert all(module.training == training for module in model.modules())


def test_look_in_fp32_is_that_without_autocast():
    """Official: the order of pixel targets is made outside of autocast."""
    images, draw = images_of((3, 4), (4, 4)), torch.rand(2, 12)
    fp32, same = build(look_precision="fp32"), build()
    plain_tokens, plain_map = same.look(images)
    with torch.autocast("cpu", torch.bfloat16):
        tokens, map_ = fp32.look(images)
        low_tokens, low_map = same.look(images)
        assert torch.is_autocast_enabled("cpu") and fp32(images, draw).prediction.dtype == torch.bfloat16
    assert torch.equal(tokens, plain_tokens) and torch.equal(map_, plain_map)
    assert 1e-4 < (low_tokens - plain_tokens).abs().max() < 0.5
    assert low_map.dtype == map_.dtype == torch.float32 and not torch.equal(low_map, plain_map)


def test_similarity_is_in_full_precision_under_autocast():
    tokens = random(2, 13, 16)
    for scaling, source in itertools.product(("softmax", "minmax"), ("cls", "gap")):
        expected = similarity_map(tokens, source, scaling)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(similarity_map(tokens, source, scaling), expected)
        torch.testing.assert_close(expected, oracle.similarity(tokens, source, scaling), atol=1e-6, rtol=1e-4)


# The running average


def test_average_starts_as_a_copy_and_is_not_trained():
    model = SemAIM(PixelTarget((4, 4)), guide="ema", img_size=8, patch_size=4, embed_dim=16, depth=4, num_heads=2)
    weights, averages = plain(model), plain(model.ema)
    assert set(averages) == set(plain(VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=4, num_heads=2)))
    for name, average in averages.items():
        assert torch.equal(average, weights[name]) and average.data_ptr() != weights[name].data_ptr()
        assert not average.requires_grad
    model(random(2, 3, 8, 8)).loss.backward()
    assert all(average.grad is None for average in averages.values())


@pytest.mark.parametrize("decay", [0.0, 0.999, 0.9, 1.0])
def test_average_moves_by_the_formula(decay):
    model = build(guide="ema")
    before = {name: average.clone() for name, average in plain(model.ema).items()}
    weights = {name: weight.clone() for name, weight in plain(model).items()}
    model.update_ema(decay)
    for name, average in plain(model.ema).items():
        expected = decay * before[name].double() + (1 - decay) * weights[name].double()
        torch.testing.assert_close(average, expected.float(), atol=1e-7, rtol=1e-6)
    assert all(torch.equal(weight, weights[n]) for n, weight in plain(model).items() if not n.startswith("ema."))


def test_average_moves_as_recorded(shared):
    recorded = load_file(shared / "golden/semaim/ema.safetensors")
    meta = json.loads((shared / "golden/semaim/ema.json").read_text())
    model = build(guide="ema", grid=(1, 1), embed_dim=16)
    rows = slice(0, 3), slice(0, 5)  # the recorded matrix, placed in a corner of one weight
    model.blocks[0].attn.qkv.weight.data[rows] = recorded["update.model"]
    model.ema.blocks[0].attn.qkv.weight.data[rows] = recorded["update.average_before"]
    model.update_ema(meta["scalars"]["decay_by_epoch"][37])
    tolerance = meta["tensors"]["update.average_after"]["atol"]
    ours = model.ema.blocks[0].attn.qkv.weight[rows]
    torch.testing.assert_close(ours, recorded["update.average_after"], atol=tolerance, rtol=0)


def test_average_gives_order_and_features():
    model = build(guide="ema", target=FeatureTarget())
    images, draw = images_of((3, 4), (4, 4)), torch.rand(2, 12)
    out = model(images, draw)
    tokens, _ = oracle_tokens(model.ema, images)
    torch.testing.assert_close(out.similarity, oracle.similarity(tokens), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.target, nn.functional.normalize(tokens[:, 1:], dim=-1), atol=1e-4, rtol=1e-4)

    model.cls_token.data += 1
    model.patch_embed.proj.weight.data *= -1
    other_weights = model(images, draw)
    assert torch.equal(other_weights.target, out.target) and torch.equal(other_weights.order, out.order)
    assert not torch.equal(other_weights.prediction, out.prediction)

    model.ema.patch_embed.proj.weight.data *= -1
    other_average = model(images, draw)
    assert not torch.equal(other_average.target, out.target)
    assert not torch.equal(other_average.similarity, out.similarity)


# A teacher


def small_teacher(width=24, patch_size=4, **options):
    torch.manual_seed(3)
    options = dict(num_classes=0, dynamic_img_size=True) | options
    network = TimmViT(img_size=8 * patch_size, patch_size=patch_size, embed_dim=width, depth=2, num_heads=2, **options)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network.eval()


def taught(network, project=False, **options):
    teacher = Teacher(network, project=project)
    return build(target=FeatureTarget(teacher.width), guide=teacher, **options)


def test_teacher_gives_order_and_features():
    network, images, draw = small_teacher(), images_of((3, 4), (4, 4)), torch.rand(2, 12)
    model = taught(network)
    out = model(images, draw)
    tokens = network.forward_features(images)
    similarity = oracle.similarity(tokens, scaling="minmax")
    torch.testing.assert_close(out.similarity, similarity, atol=1e-5, rtol=1e-4)
    assert torch.equal(out.order, make_order("semantic", out.similarity, (3, 4), draw))
    torch.testing.assert_close(out.target, nn.functional.normalize(tokens[:, 1:], dim=-1))
    prediction = oracle_prediction(model, images, oracle.rank_of(out.order))
    assert prediction.shape[-1] == 24
    torch.testing.assert_close(out.loss, oracle.feature_loss(prediction, tokens).mean(), atol=1e-5, rtol=0)


def test_teacher_is_neither_saved_nor_trained():
    network = small_teacher()
    model = taught(network).train()
    assert set(model.state_dict()) == set(build().state_dict())
    model(images_of((3, 4), (4, 4))).loss.backward()
    assert not network.training and all(parameter.grad is None for parameter in network.parameters())


def test_teachers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="the target has 16 channels, the guide's tokens have 24"):
        build(target=FeatureTarget(16), guide=Teacher(small_teacher()))
    with pytest.raises(ValueError, match="has no projection"):
        Teacher(small_teacher(num_classes=0), project=True)


@pytest.mark.parametrize(
    "network, project, width",
    [
        (dict(patch_size=6), False, 24),
        (dict(reg_tokens=4), False, 24),
        (dict(num_classes=10), True, 10),
        (dict(num_classes=10), False, 24),
    ],
)
def test_kinds_of_teachers(network, project, width):
    out = taught(small_teacher(**network), project)(images_of((3, 4), (4, 4)))
    assert out.target.shape == out.prediction.shape == (2, 12, width)
    out.loss.backward()


# Errors


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(order="semantik"), "semantik.*did you mean.*semantic"),
        (dict(decoder_depth=3), "decoder_depth 3.*depth 4"),
        (dict(similarity="max"), "similarity 'max'.*cls, gap or self"),
        (dict(guide="student"), "guide 'student'.*online, ema or a teacher"),
        (dict(head="conv"), "head 'conv'.*mlp or linear"),
        (dict(look_precision="fp16"), "look_precision 'fp16'.*same or fp32"),
        (dict(img_size=30), "30 x 30 pixels"),
    ],
)
def test_wrong_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        build(**wrong)


def test_class_attention_of_a_teacher_is_refused():
    with pytest.raises(ValueError, match="similarity self.*teacher"):
        taught(small_teacher(), similarity="self")


@pytest.mark.parametrize("order", ["raster", "semantic"])
def test_image_that_the_patch_does_not_divide(order):
    with pytest.raises(ValueError, match="12 x 15 pixels"):
        build(order=order)(random(1, 3, 12, 15))


# The oracle itself, against the recorded results of the reference


@pytest.mark.parametrize(
    "case", ["pixel", "pixel_l1_qd2_linear", "large_decoder", "feature", "feature_clip", "clip_tower"]
)
def test_oracle_gives_the_recorded_loss(shared, case):
    recorded = load_file(shared / f"golden/semaim/{case}.safetensors")
    meta = json.loads((shared / f"golden/semaim/{case}.json").read_text())
    config = meta["config"]
    images = load_file(shared / "golden/images.safetensors")[meta["images"]["tensor"]][: len(recorded["order_key"])]
    p = {name.removeprefix("param."): t for name, t in recorded.items() if name.startswith("param.")}
    prediction = oracle.predict(
        images,
        p,
        recorded["order_key"],
        patch=(16, 16),
        depth=config["depth"],
        heads=config["num_heads"],
        decoder_depth=config["query_depth"],
        head=config["prediction_head_type"].lower(),
    )
    tensors = meta["tensors"]
    torch.testing.assert_close(prediction, recorded["pred"][:, 1:], atol=tensors["pred"]["atol"], rtol=0)
    if "teacher_tokens" in recorded:
        loss_map = oracle.feature_loss(prediction, recorded["teacher_tokens"])
    else:
        kernel = config["gaussian_kernel_size"] or 0
        target = oracle.pixel_target(images, (16, 16), kernel, config["gaussian_sigma"], config["norm_pix_loss"])
        loss_map = oracle.pixel_loss(prediction, target, config["loss_type"].lower())
    torch.testing.assert_close(loss_map, recorded["loss_map"], atol=tensors["loss_map"]["atol"], rtol=0)


def test_masks_of_the_oracle_are_the_recorded_ones(shared):
    recorded = load_file(shared / "golden/semaim/orders.safetensors")
    content, query = oracle.visible(recorded["tie_example.key"])
    assert torch.equal(content, recorded["tie_example.content_visible"].bool())
    assert torch.equal(query, recorded["tie_example.query_visible"].bool())
