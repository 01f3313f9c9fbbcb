"""What guides SemAIM's order: the encoder itself, its running average, or a teacher."""

import itertools
import json

import oracle
import pytest
import torch
from safetensors.torch import load_file
from semaim_models import build, images_of, oracle_prediction, oracle_tokens, plain, random
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn

from semaim.models import FeatureTarget, PixelTarget, SemAIM, Teacher, VisionTransformer
from semaim.models.ordering import make_order, similarity_map

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


def test_class_attention_of_a_teacher_is_refused():
    with pytest.raises(ValueError, match="similarity self.*teacher"):
        taught(small_teacher(), similarity="self")
