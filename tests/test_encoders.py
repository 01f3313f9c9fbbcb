"""Encoders of timm's architectures behind the contract: equal to timm in tokens, maps, pooling, layers and weights."""

import pytest
import timm.optim
import torch
from encoder_files import (
    ARCHS,
    FIRST,
    checkpoint_of,
    images_of,
    loaded,
    narrow,
    random_state,
    reference,
    sizes_of,
    source_of,
)
from timm.layers import global_pool_nlc

from semaim.encoders.contract import build
from semaim.encoders.networks import PlainClassifier, PlainSegmentationViT, PlainViTDet
from semaim.encoders.sources import open_source, trained_here
from semaim.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

#: timm resamples their positions bilinearly when it loads weights, and bicubically in the forward pass: weights loaded
#: for a size and images of another size give different tokens, in timm too.
TWO_WAYS = ("flexivit_small", "vit_base_patch16_radio_v3")

#: Of the classes, blocks, positions and poolings.
REOPENED = (
    "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_base_patch16_siglip_224", "beit_base_patch16_224",
    "vit_so150m2_patch16_reg1_gap_256", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_rope_mixed_ape_224",
    "vit_small_patch16_dinov3", "eva02_tiny_patch14_224",
)  # fmt: skip
#: timm scales the coordinates of its rotary positions at random in training.
RANDOM = ("vit_base_patch16_sapiens2",)


def assert_near(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def network_with(kind, arch, **options):
    """One of the suite's networks on an encoder with random weights."""
    source = source_of(arch)
    network = kind(source.description, **options)
    network.encoder.load(source)
    return network


# Tokens and maps


def assert_tokens_equal_timm(arch, wide=False):
    own = loaded(arch, wide)
    for size in sizes_of(arch):
        images = images_of(size)
        expected = reference(arch, size, wide).forward_features(images)
        at_size = loaded(arch, wide, img_size=size)
        assert at_size.img_size == size
        assert_near(at_size(images), expected)
        if arch in TWO_WAYS:
            expected = reference(arch, None, wide, dynamic_img_size=True).forward_features(images)
        assert_near(own(images), expected)


#: All of them; those that are not the first of their family among the slow tests.
EACH = [arch if arch in FIRST else pytest.param(arch, marks=pytest.mark.slow) for arch in ARCHS]


@pytest.mark.parametrize("arch", ARCHS)
@torch.no_grad()
def test_tokens_equal_timm_at_every_size(arch):
    assert_tokens_equal_timm(arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [arch for arch in FIRST if not arch.endswith("sapiens2")])  # its blocks differ in kind
@torch.no_grad()
def test_tokens_equal_timm_at_the_width_of_the_architecture(arch):
    assert_tokens_equal_timm(arch, wide=True)


@pytest.mark.parametrize("arch", EACH)
@torch.no_grad()
def test_maps_equal_timm_in_encoder_segmentor_and_detector(arch):
    size = sizes_of(arch)[2]
    images = images_of(size)
    expected = reference(arch, size).forward_intermediates(images, indices=[0, 1], norm=False, intermediates_only=True)
    assert not torch.allclose(*expected, atol=0.1)
    encoder = loaded(arch, img_size=size)
    for found, wanted in zip(encoder.maps(images, (0, 1)), expected, strict=True):
        assert_near(found, wanted)
    common = {"img_size": size, "patch_size": None, "out_blocks": (0, 1)}
    segmentor = network_with(PlainSegmentationViT, arch, **common)
    detector = network_with(PlainViTDet, arch, global_blocks=(0, 1), **common)
    last = network_with(PlainViTDet, arch, global_blocks=(0, 1), img_size=size, patch_size=None)
    for network in (segmentor, detector):  # in training too: without drop path nothing is random
        network.train(arch not in RANDOM)
        for found, wanted in zip(network(images), expected, strict=True):
            assert_near(found, wanted)
    assert_near(last.eval()(images), expected[1])


# Gradients


@pytest.mark.parametrize("arch", EACH)
def test_gradients_reach_all_that_is_trained(arch):
    size = sizes_of(arch)[1]
    images = images_of(size, images=2)
    networks = {
        "windows": network_with(
            PlainViTDet, arch, img_size=size, patch_size=None, window_size=4, global_blocks=(1,), out_blocks=(1,)
        ),
        "dropped": network_with(
            PlainViTDet, arch, img_size=size, patch_size=None, window_size=4, global_blocks=(), prefix="dropped"
        ),
        "segmentation": network_with(PlainSegmentationViT, arch, img_size=size, patch_size=None),
    }
    for pool in pools_of(arch):
        networks[pool] = network_with(PlainClassifier, arch, pool=pool, num_classes=3, head_init_std=0.1, img_size=size)
    for use, network in networks.items():
        found = network.train()(images)
        found = found if isinstance(found, tuple) else (found,)
        sum((maps * torch.randn_like(maps)).sum() for maps in found).backward()
        trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        without = [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
        assert not without, f"{use}: {without}"
        assert {"encoder.vit.patch_embed.proj.weight"} < trained.keys()


def pools_of(arch):
    encoder = build(source_of(arch).description)
    return [pool for pool, has in (("avg", True), ("cls", encoder.has_class_token), ("native", True)) if has]


# Pooling


@pytest.mark.parametrize("arch", EACH)
@torch.no_grad()
def test_pooling_equals_timm(arch):
    size = sizes_of(arch)[1]
    images, encoder, timms = images_of(size, images=2), loaded(arch, img_size=size), reference(arch, size)
    tokens = timms.forward_features(images)
    expected = {
        "native": timms(images),
        "avg": global_pool_nlc(tokens, "avg", timms.num_prefix_tokens),
        "cls": global_pool_nlc(tokens, "token"),
    }
    assert encoder.has_class_token == (getattr(timms, "cls_token", None) is not None)
    for pool in pools_of(arch):
        assert_near(encoder.features(images, pool), expected[pool])
        assert encoder.width_of(pool) == expected[pool].shape[1]
        network = network_with(PlainClassifier, arch, pool=pool, num_classes=0, img_size=size).eval()
        assert_near(network(images), expected[pool])
    if not encoder.has_class_token:
        with pytest.raises(UserError, match="pool=cls: .* has no class token: choose avg or native"):
            encoder.features(images, "cls")
        with pytest.raises(UserError, match="pool=cls"):
            PlainClassifier(encoder.description, pool="cls")


# Layers


@pytest.mark.parametrize("arch", EACH)
def test_layers_and_weight_decay_are_timms(arch):
    timms = timm.create_model(arch, num_classes=3, **narrow(arch))
    excepted = timms.no_weight_decay()
    names = {id(parameter): name for name, parameter in timms.named_parameters()}
    groups = timm.optim.param_groups_layer_decay(timms, 0.1, excepted, layer_decay=0.5)
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    encoder = build(source_of(arch).description)
    layers = {name: encoder.get_layer_depth(name) for name, _ in encoder.named_parameters()}
    assert len({number for _, number in layers.values()}) == 1
    found = {name: 0.5 ** (number - 1 - layer) for name, (layer, number) in layers.items()}
    most = found["vit.patch_embed.proj.weight"] / scale["patch_embed.proj.weight"]
    assert found == {f"vit.{name}": most * value for name, value in scale.items() if not name.startswith("head")}
    layer, number = encoder.get_layer_depth("head")
    assert layer == number - 1 > max(layer for layer, _ in layers.values())
    assert encoder.no_weight_decay() == {f"vit.{name}" for name in excepted}


# Checkpoints


def a_step(network, images):
    """One step of training, then eval mode."""
    found = network.train()(images)
    sum(maps.square().mean() for maps in (found if isinstance(found, tuple) else (found,))).backward()
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    return network.eval()


def run_of(network, holder, options, tmp_path):
    """The checkpoint of a run that trained a network, and the network's outputs again after loading it."""
    kept = {"type": type(network).__name__, "encoder": network.encoder.description, **options}
    content = checkpoint_of(network, model={holder: kept}, dataset={"mean": [0.5] * 3, "std": [0.25] * 3})
    assert trained_here(content) == network.encoder.description
    again = type(network)(content["config"]["model"][holder]["encoder"], **options)
    again.load_state_dict(content["model"])
    if holder == "backbone":
        content["model"] = {f"backbone.{name}": tensor for name, tensor in content["model"].items()}
        content["model"]["neck.weight"] = torch.zeros(1)
    torch.save(content, tmp_path / "run.pth")
    return tmp_path / "run.pth", again.eval()


USES = {
    "avg": (PlainClassifier, "network", {"pool": "avg", "num_classes": 3, "head_init_std": 0.1}),
    "native": (PlainClassifier, "network", {"pool": "native", "num_classes": 3, "head_init_std": 0.1}),
    "maps": (PlainSegmentationViT, "backbone", {"patch_size": None, "out_blocks": [0, 1]}),
    "windows": (PlainViTDet, "backbone", {"patch_size": None, "global_blocks": [1], "window_size": 4}),
    "whole": (PlainViTDet, "backbone", {"patch_size": None, "global_blocks": [0, 1]}),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("arch", REOPENED)
def test_a_trained_network_is_loaded_and_its_encoder_opened_again(arch, use, tmp_path):
    kind, holder, options = USES[use]
    size = sizes_of(arch)[1]
    options = {**options, "img_size": list(size)}
    images = images_of(size, images=2)
    network = a_step(network_with(kind, arch, **options), images)
    file, again = run_of(network, holder, options, tmp_path)
    with torch.no_grad():
        expected = network(images)
        for found, wanted in zip(again(images), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=0, rtol=0)
        source = open_source(file)
        assert source.layout == "semaim" and source.preparation.statistics.mean == (0.5, 0.5, 0.5)
        opened = kind(source.description, **options)
        report = opened.encoder.load(source)
        assert not report.missing and set(report.matched) == set(network.encoder.vit.state_dict())
        if kind is PlainClassifier:
            found, wanted = opened.eval().features(images), network.features(images)
        else:
            found, wanted = opened.eval()(images), expected
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=0, rtol=0)


@torch.no_grad()
def test_an_opened_encoder_has_the_maps_of_the_run_at_other_sizes(tmp_path):
    arch, options = "vit_small_patch14_reg4_dinov2", {"pool": "avg", "num_classes": 0, "img_size": 84}
    network = network_with(PlainClassifier, arch, **options).eval()
    file, _ = run_of(network, "network", options, tmp_path)
    source = open_source(file)
    for size in ((140, 140), (70, 126)):
        opened = PlainSegmentationViT(source.description, img_size=size, patch_size=None, out_blocks=(0, 1)).eval()
        opened.encoder.load(source)
        images = images_of(size)
        for found, wanted in zip(opened(images), network.encoder.maps(images, (0, 1)), strict=True):
            assert_near(found, wanted)


@torch.no_grad()
def test_what_a_run_has_not_kept_is_missed_by_name(tmp_path):
    arch, options = "vit_so150m2_patch16_reg1_gap_256", {"pool": "avg", "num_classes": 0, "img_size": 96}
    file, _ = run_of(network_with(PlainClassifier, arch, **options), "network", options, tmp_path)
    source = open_source(file)
    opened = PlainClassifier(source.description, pool="native", img_size=96)
    with pytest.raises(UserError, match="it lacks fc_norm.weight, fc_norm.bias"):
        opened.encoder.load(source)
    assert open_source(file, arch).description == source.description  # as in the config that the run has written
    with pytest.raises(UserError, match="records its architecture, vit_so150m2_patch16_reg1_gap_256: leave --arch out"):
        open_source(file, "vit_tiny_patch16_224")


OWN = {"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 16}


def own_network(kind, **options):
    network = kind({"family": "semaim", **OWN}, **options)
    network.encoder.load_state_dict(random_state(network.encoder))
    return network


@pytest.mark.parametrize(
    ("kind", "holder", "options"),
    [
        (PlainClassifier, "network", {"pool": "cls", "num_classes": 3, "head_init_std": 0.1, "img_size": 64}),
        (PlainSegmentationViT, "backbone", {"img_size": 64, "out_blocks": [0, 1]}),
        (PlainViTDet, "backbone", {"img_size": 64, "global_blocks": [1], "window_size": 2}),
        (PlainClassifier, "network", {"pool": "cls", "num_classes": 3, "head_init_std": 0.1}),
    ],
)  # fmt: skip
def test_our_own_vit_is_trained_and_opened_again_by_the_same_networks(kind, holder, options, tmp_path):
    images = images_of((64, 64), images=2)
    network = own_network(kind, **options)
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    file, again = run_of(a_step(network, images), holder, options, tmp_path)
    same = [name for name, parameter in network.named_parameters() if torch.equal(before[name], parameter)]
    assert not same
    source = open_source(file)
    opened = kind(source.description, **options)
    opened.encoder.load(source)
    with torch.no_grad():
        for found, wanted in zip(again(images), network(images), strict=True):
            assert torch.equal(found, wanted)
        outputs = [
            one.eval().features(images) if kind is PlainClassifier else one.eval()(images) for one in (opened, network)
        ]
        for found, wanted in zip(*outputs, strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("size", [96, 128])
def test_tables_of_a_detectors_windows_are_resized_for_other_tasks(size, tmp_path):
    arch = "beit_base_patch16_224"
    options = {"patch_size": None, "global_blocks": [1], "window_size": 4, "img_size": 96}
    file, _ = run_of(network_with(PlainViTDet, arch, **options), "backbone", options, tmp_path)
    source = open_source(file)
    opened = PlainSegmentationViT(source.description, img_size=size)
    opened.encoder.load(source)
