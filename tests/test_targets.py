"""Targets and guides on their own: pixels, features, decay of the running average, teachers."""

import itertools
import json
import math

import oracle
import pytest
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch.nn import functional as F

from semaim.models.targets import FeatureTarget, PixelTarget, Teacher, ema_decay, gaussian_kernel


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Pixels


@pytest.mark.parametrize(
    "kernel, norm_pix, loss, patch",
    list(itertools.product((0, 5, 9), (True, False), ("l1", "l2"), ((4, 4), (8, 4)))),
)
def test_pixel_target_equals_the_oracle(kernel, norm_pix, loss, patch):
    images, prediction = random(2, 3, 16, 24), random(2, 16 * 24 // (patch[0] * patch[1]), patch[0] * patch[1] * 3)
    ours = PixelTarget(patch, blur_kernel=kernel, norm_pix=norm_pix, loss=loss)
    target = ours.prepare(images)
    expected = oracle.pixel_target(images.double(), patch, kernel, norm_pix=norm_pix)
    assert ours.width == target.shape[-1] == patch[0] * patch[1] * 3
    torch.testing.assert_close(target, expected.float(), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(ours.loss(prediction, target), oracle.pixel_loss(prediction, target, loss))


def test_sigma_and_channels():
    images = random(2, 1, 12, 12)
    target = PixelTarget((4, 4), in_chans=1, blur_kernel=5, blur_sigma=2.5).prepare(images)
    expected = oracle.pixel_target(images.double(), (4, 4), 5, 2.5).float()
    torch.testing.assert_close(target, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("size, sigma", [(1, 1.0), (5, 1.0), (9, 1.0), (9, 3.0)])
def test_kernel_sums_to_one_and_is_symmetric(size, sigma):
    line = gaussian_kernel(size, sigma)
    kernel = torch.outer(line, line)
    assert kernel.shape == (size, size) and kernel.argmax() == size * size // 2
    assert kernel.sum().item() == pytest.approx(1, abs=1e-6)
    assert torch.equal(kernel, kernel.T) and torch.equal(kernel, kernel.flip(0))
    torch.testing.assert_close(kernel, torch.tensor(oracle.gaussian(size, sigma)))


def test_blur_fades_to_zero_at_the_border():
    target = PixelTarget((12, 12), in_chans=1, norm_pix=False)
    blurred = target.prepare(torch.ones(1, 1, 12, 12)).view(12, 12)
    line = gaussian_kernel(9, 1.0)
    assert blurred[5, 5].item() == pytest.approx(1, abs=1e-6)
    assert blurred[0, 5].item() == pytest.approx(line[4:].sum().item(), abs=1e-6)
    assert blurred[0, 0].item() == pytest.approx(line[4:].sum().item() ** 2, abs=1e-6)
    assert blurred[11, 11].item() == pytest.approx(blurred[0, 0].item(), abs=1e-6)


def test_normalised_patches_have_unbiased_unit_variance():
    target = PixelTarget((4, 4), blur_kernel=0).prepare(random(2, 3, 8, 8, seed=1).double() * 5 + 3)
    torch.testing.assert_close(target.mean(-1), torch.zeros(2, 4).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(target.square().sum(-1), torch.full((2, 4), 47.0).double(), atol=1e-4, rtol=0)


def test_constant_patch_does_not_blow_up():
    images = torch.full((1, 3, 8, 8), 0.7, requires_grad=True)
    target = PixelTarget((4, 4), blur_kernel=0).prepare(images)
    assert target.abs().max() < 1e-3
    target.sum().backward()
    assert images.grad.isfinite().all()


def test_double_stays_double():
    images = random(1, 3, 8, 8).double()
    for kernel in (0, 9):
        target = PixelTarget((4, 4), blur_kernel=kernel).double().prepare(images)
        assert target.dtype == torch.float64
        assert PixelTarget((4, 4)).loss(target.float(), target).dtype == torch.float64


def test_target_and_loss_are_in_full_precision_under_autocast():
    images, target = random(1, 3, 8, 8), PixelTarget((4, 4))
    expected = target.prepare(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(target.prepare(images), expected)
        assert target.loss(expected.bfloat16(), expected).dtype == torch.float32


def test_kernel_is_not_saved():
    assert not PixelTarget((4, 4)).state_dict()


@pytest.mark.parametrize(
    "wrong, message", [(dict(loss="huber"), "huber.*l1 or l2"), (dict(blur_kernel=4), "blur_kernel 4.*odd")]
)
def test_pixel_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        PixelTarget((4, 4), **wrong)


# Features


def test_feature_loss_is_two_minus_twice_the_cosine():
    target, tokens, prediction = FeatureTarget(), random(2, 6, 8) * 3, random(2, 5, 8, seed=1)
    prepared = target.prepare(random(2, 3, 4, 4), tokens)
    torch.testing.assert_close(prepared.norm(dim=-1), torch.ones(2, 5))
    loss = target.loss(prediction, prepared)
    expected = 2 - 2 * F.cosine_similarity(prediction, tokens[:, 1:], dim=-1)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(loss, oracle.feature_loss(prediction, tokens), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(target.loss(7 * tokens[:, 1:], prepared), torch.zeros(2, 5), atol=1e-6, rtol=0)


def test_feature_target_has_the_precision_of_the_images():
    tokens = random(1, 5, 8).bfloat16()
    prepared = FeatureTarget(8).prepare(random(1, 3, 4, 4), tokens)
    assert prepared.dtype == torch.float32
    assert FeatureTarget(8).loss(tokens[:, 1:], prepared).dtype == torch.float32


# Decay


@pytest.mark.parametrize("epoch, decay", [(0, 0.999), (50, 0.99945), (100, 0.9999), (101, 0.9999), (799, 0.9999)])
def test_decay_rises_for_a_hundred_epochs(epoch, decay):
    assert ema_decay(epoch) == pytest.approx(decay, abs=1e-12)


def test_decay_is_the_recorded_one(shared):
    recorded = json.loads((shared / "golden/semaim/ema.json").read_text())["scalars"]["decay_by_epoch"]
    assert [ema_decay(epoch) for epoch in range(len(recorded))] == pytest.approx(recorded, abs=1e-12)


# Teachers


def small_vit(patch_size=4, **options):
    torch.manual_seed(3)
    options = dict(num_classes=0, global_pool="token", dynamic_img_size=True) | options
    network = TimmViT(img_size=5 * patch_size, patch_size=patch_size, embed_dim=16, depth=2, num_heads=2, **options)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network.eval()


def test_teacher_gives_its_own_tokens():
    network, images = small_vit(), random(2, 3, 12, 16)
    tokens = Teacher(network)(images, (3, 4))
    assert tokens.shape == (2, 13, 16) and Teacher(network).width == 16
    torch.testing.assert_close(tokens, network.forward_features(images))


def test_teacher_is_frozen_and_in_eval_mode():
    network = small_vit(drop_path_rate=0.9).train().requires_grad_(True)
    tokens = Teacher(network)(random(2, 3, 12, 16), (3, 4))
    assert not network.training and not tokens.requires_grad
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_teacher_of_another_patch_size_sees_resized_images():
    network, images = small_vit(patch_size=6), random(2, 3, 12, 16)
    tokens = Teacher(network)(images, (3, 4))
    resized = F.interpolate(images, (18, 24), mode="bicubic", antialias=True)
    torch.testing.assert_close(tokens, network.forward_features(resized))


def test_teacher_gets_images_in_its_own_statistics():
    network, pixels = small_vit(), torch.rand(2, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.5])
    own_mean, own_std = torch.tensor([0.1, 0.2, 0.6]), torch.tensor([0.3, 0.35, 0.7])
    network.pretrained_cfg = dict(mean=tuple(own_mean.tolist()), std=tuple(own_std.tolist()))
    teacher = Teacher(network, mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    tokens = teacher((pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1), (3, 4))
    expected = network.forward_features((pixels - own_mean.view(3, 1, 1)) / own_std.view(3, 1, 1))
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-4)


def test_statistics_of_a_model_of_timm_are_found():
    network = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, depth=1)
    assert network.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    pixels = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    tokens = Teacher(network)((pixels - mean) / std, (2, 3))
    torch.testing.assert_close(tokens, network.forward_features(pixels * 2 - 1), atol=1e-4, rtol=1e-4)


def test_teacher_may_see_the_students_images_as_they_are():
    network, images = small_vit(), random(2, 3, 12, 16)
    network.pretrained_cfg = dict(mean=(0.1, 0.2, 0.6), std=(0.3, 0.35, 0.7))
    tokens = Teacher(network, normalisation="student")(images, (3, 4))
    assert torch.equal(tokens, network.forward_features(images))
    assert not torch.allclose(Teacher(network, normalisation="teacher")(images, (3, 4)), tokens, atol=0.1)
    with pytest.raises(ValueError, match="normalisation 'own'.*teacher or student"):
        Teacher(network, normalisation="own")


def test_projection_is_in_full_precision_under_autocast():
    network, images = small_vit(num_classes=10), random(2, 3, 12, 16)
    with torch.autocast("cpu", torch.bfloat16):
        seen = network.forward_features(images).float()
        tokens = Teacher(network, project=True)(images, (3, 4))
    assert tokens.dtype == torch.float32
    torch.testing.assert_close(tokens, seen @ network.head.weight.T + network.head.bias)


def test_register_tokens_are_skipped():
    network, images = small_vit(reg_tokens=3), random(2, 3, 12, 16)
    tokens, own = Teacher(network)(images, (3, 4)), network.forward_features(images)
    assert own.shape[1] == 1 + 3 + 12
    assert torch.equal(tokens[:, 0], own[:, 0]) and torch.equal(tokens[:, 1:], own[:, 4:])


def test_projection_passes_the_head():
    network, images = small_vit(num_classes=10), random(2, 3, 12, 16)
    teacher = Teacher(network, project=True)
    tokens = teacher(images, (3, 4))
    assert tokens.shape == (2, 13, 10) and teacher.width == 10
    expected = network.forward_features(images) @ network.head.weight.T + network.head.bias
    torch.testing.assert_close(tokens, expected)


@pytest.mark.parametrize(
    "make", [lambda: torch.nn.Linear(3, 3), lambda: small_vit(class_token=False, global_pool="avg")]
)
def test_what_cannot_teach(make):
    network = make()
    with pytest.raises(ValueError, match=f"{type(network).__name__} cannot be a teacher.*class token"):
        Teacher(network)


def test_gradient_reaches_the_prediction_only():
    prediction, target = random(1, 4, 48).requires_grad_(), PixelTarget((4, 4))
    target.loss(prediction, target.prepare(random(1, 3, 8, 8))).mean().backward()
    assert prediction.grad.norm() > 0 and math.isfinite(prediction.grad.norm())
