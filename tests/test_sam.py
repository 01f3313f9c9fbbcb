"""SAM's encoder: timm's numbers in every task, files by timm's names and by SAM's own, and what it refuses."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

import semaim
from semaim.encoders.networks import PlainClassifier, PlainSegmentationViT, PlainViTDet
from semaim.encoders.sources import open_source
from semaim.errors import UserError

ARCH = "samvit_base_patch16"
SMALL = {"depth": 3, "embed_dim": 64, "num_heads": 2, "img_size": 256, "global_attn_indexes": [2]}
DESCRIPTION = {"family": "sam", "arch": ARCH, "args": SMALL}


@pytest.fixture
def vit():
    """timm's network, small, every weight random."""
    torch.manual_seed(0)
    network = timm.create_model(ARCH, num_classes=0, **SMALL).eval()
    for parameter in network.parameters():
        parameter.data.normal_(std=0.1)
    return network


def own(name):
    """A name of timm's as SAM's own files have it."""
    return "image_encoder." + name.replace("mlp.fc", "mlp.lin")


@pytest.fixture(params=["timm", "SAM"])
def source(request, vit, tmp_path, monkeypatch):
    """A file of its weights, which `--arch` names; the network is built small."""
    state = vit.state_dict()
    if request.param == "SAM":
        state = {own(name): tensor for name, tensor in state.items()} | {"mask_decoder.x": torch.ones(2)}
    save_file(state, tmp_path / "sam.safetensors")
    found = open_source(tmp_path / "sam.safetensors", f"{ARCH}.sa1b")
    found.description["args"] = SMALL
    return found


@torch.no_grad()
def test_tokens_and_maps_are_timms_at_any_size(vit, source):
    encoder = source.build().eval()
    report = encoder.load(source)
    assert len(report.matched) == len(vit.state_dict())
    for size in ((256, 256), (128, 192)):
        images = torch.randn(2, 3, *size)
        tokens = vit.forward_features(images).flatten(2).transpose(1, 2)
        assert torch.equal(encoder(images), tokens)
        assert torch.equal(encoder.features(images, "avg"), tokens.mean(dim=1))
        expected = vit.forward_intermediates(images, indices=[0, 2], intermediates_only=True)
        assert all(map(torch.equal, encoder.maps(images, [0, 2]), expected))
        for network in (PlainViTDet(DESCRIPTION, 256, out_blocks=[0, 2]), PlainSegmentationViT(DESCRIPTION, 256)):
            network.eval().encoder.load(source)
            assert torch.equal(network(images)[-1], expected[-1])


@pytest.mark.parametrize("kind", [PlainViTDet, PlainSegmentationViT])
def test_gradients_reach_all_that_is_trained(kind):
    network = kind(DESCRIPTION, img_size=128)
    maps = network(torch.randn(1, 3, 128, 128))
    sum(level.square().mean() for level in (maps if isinstance(maps, tuple) else (maps,))).backward()
    assert not [name for name, weight in network.named_parameters() if weight.grad is None]


def test_a_tensor_that_is_missing_or_of_another_network_is_named(source):
    for name in list(source.state):
        less = {key: value for key, value in source.state.items() if key != name}
        source.state, whole = less, source.state
        with pytest.raises(UserError, match=name.replace("mlp.lin", "mlp.fc").split(".")[-1]):
            source.build().load(source)
        source.state = whole
    source.state["blocks.0.ls1.gamma"] = torch.ones(64)
    with pytest.raises(UserError, match="ls1.gamma"):
        source.build().load(source)


def test_what_it_does_not_have_is_refused_when_a_network_is_built():
    for pool, message in (("cls", "has no class token"), ("native", "has no pooling of its own")):
        with pytest.raises(UserError, match=message):
            PlainClassifier(DESCRIPTION, 3, pool)
    for options in ({"window_size": 7}, {"global_blocks": [1]}, {"prefix": "dropped"}):
        with pytest.raises(UserError, match="windows of its own"):
            PlainViTDet(DESCRIPTION, 256, **options)
    with pytest.raises(UserError, match="its tables fit no others"):
        PlainSegmentationViT(DESCRIPTION, 256, patch_size=14)


def test_the_library_opens_it(vit, tmp_path):
    state, args = vit.state_dict(), {**SMALL}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": ARCH, "model_args": args, "pretrained_cfg": {"crop_pct": 1.0}})
    )
    encoder = semaim.load_encoder(f"local-dir:{tmp_path}")
    assert encoder.mean == pytest.approx(timm.data.IMAGENET_DEFAULT_MEAN) and encoder.num_prefix_tokens == 0
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(encoder(images), vit.forward_features(images).flatten(2).transpose(1, 2))
