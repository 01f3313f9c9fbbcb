"""The two-stream model: equal to the masked oracle in loss and gradient, and causal."""

import itertools

import oracle
import pytest
import torch
from semaim_models import SHAPES, build, images_of, oracle_prediction, oracle_tokens, random

from semaim.models import FeatureTarget, SemAIM
from semaim.models.ordering import ORDERS, SEMANTIC_ORDERS, make_order


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


@pytest.mark.parametrize("order", ["raster", "semantic"])
def test_image_that_the_patch_does_not_divide(order):
    with pytest.raises(ValueError, match="12 x 15 pixels"):
        build(order=order)(random(1, 3, 12, 15))
