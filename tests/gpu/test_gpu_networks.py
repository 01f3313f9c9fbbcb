"""On each device: losses, gradients and maps are those of fp64, compiled or not, and the memory is less than masks'."""

import pytest
import torch
from devices import compiled, difference, in_double
from test_ordering import inputs

from semaim.benchmarks.baselines import ExplicitMasks
from semaim.benchmarks.detection import block_pass, build_block
from semaim.encoders.networks import PlainSegmentationViT, PlainViTDet
from semaim.models import FeatureTarget, PixelTarget, SemAIM
from semaim.models.mae import MAE
from semaim.models.ordering import ORDERS, make_order
from semaim.models.segvit import SegmentationViT
from semaim.models.vitdet import SimpleFeaturePyramid, ViTDet

SMALL = {"size": "tiny", "depth": 2, "img_size": 64, "patch_size": 8}
PIXELS = {"target": PixelTarget((8, 8), blur_kernel=3)}
NETWORKS = {
    "semantic": lambda size: SemAIM(**PIXELS, **size),
    "stochastic": lambda size: SemAIM(**PIXELS, order="stochastic", **size),
    "attention map": lambda size: SemAIM(**PIXELS, similarity="self", **size),
    "features": lambda size: SemAIM(FeatureTarget(), guide="ema", **size),
    "mae": lambda size: MAE(PixelTarget((8, 8), blur_kernel=0), decoder_embed_dim=64, decoder_depth=1, **size),
}
COMPILED = [*((name, False) for name in NETWORKS), pytest.param("semantic", True, marks=pytest.mark.slow)]


def step(model, images, draw):
    """The loss, and the gradients of all trained weights."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    loss = model(images, draw).loss
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    return loss.item(), [gradient for gradient in gradients if gradient is not None]


@pytest.mark.parametrize("name, by_compiler", COMPILED)
def test_losses_and_gradients_are_those_of_fp64(name, by_compiler, device):
    torch.manual_seed(0)
    model = NETWORKS[name]({**SMALL, "depth": 1} if by_compiler else SMALL)
    images, draw = torch.randn(4, 3, 64, 64), torch.rand(4, 64)
    loss, gradients = step(in_double(model), images.double(), draw.double())
    model.to(device)
    if by_compiler:
        compiled(model, device)
    images, draw = images.to(device), draw.to(device)
    found = step(model, images, draw)
    assert found[0] == pytest.approx(loss, rel=1e-5) and difference(found[1], gradients) < 1e-3
    assert all(gradient.device.type == device for gradient in found[1])
    with torch.autocast(device, torch.bfloat16):
        assert model(images, draw).loss.item() == pytest.approx(loss, rel=2e-2)
        model.look_precision = "fp32"  # the order of fp64
        low = step(model, images, draw)
    assert low[0] == pytest.approx(loss, rel=2e-2) and 1e-4 < difference(low[1], gradients) < 0.1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dense_encoders_are_those_of_fp64(precision, device):
    torch.manual_seed(0)
    encoders = (
        torch.nn.Sequential(ViTDet(**SMALL, window_size=3, global_blocks=(1,)), SimpleFeaturePyramid(192, 64, 8)),
        SegmentationViT(**SMALL, out_blocks=(0, 1)),
    )
    for encoder in encoders:
        for name, table in encoder.named_parameters():
            if "rel_pos" in name or "rel_bias" in name:
                torch.nn.init.normal_(table, std=0.2)
        images = torch.randn(2, 3, 64, 64)
        expected = in_double(encoder)(images.double())
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            found = encoder.to(device)(images.to(device))
        assert difference(found, expected) < (1e-5 if precision == "fp32" else 2e-2), type(encoder)


PLAIN = ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224"]
PLAIN += [pytest.param("beit_base_patch16_224", marks=pytest.mark.slow)]  # timm has no smaller one


@pytest.mark.parametrize("arch", PLAIN)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_maps_of_any_encoder_are_those_of_fp32_on_a_cpu(arch, precision, device):
    """Windows, prefix tokens, rotary positions and tables: maps, and the gradient of the patch projection."""
    torch.manual_seed(0)
    described = {"family": "timm", "arch": arch, "args": {"depth": 4}}
    for network in (PlainViTDet(described, img_size=224, patch_size=16), PlainSegmentationViT(described, img_size=128)):
        for name, weight in network.named_parameters():
            torch.nn.init.normal_(weight, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.05)
        side, found = network.encoder.img_size[0], []
        images = torch.randn(2, 3, side, side)
        for place, low in (("cpu", False), (device, precision == "bf16")):
            network.to(place).zero_grad()
            with torch.autocast(place, torch.bfloat16, enabled=low):
                out = network(images.to(place))
            maps = out if isinstance(out, tuple) else (out,)
            torch.cat([one.float().flatten() for one in maps]).square().mean().backward()
            found.append((maps, network.encoder.vit.patch_embed.proj.weight.grad.clone()))
        for ours, theirs in ((found[1][0], found[0][0]), ([found[1][1]], [found[0][1]])):
            far = difference(ours, theirs)
            assert far < (1e-4 if precision == "fp32" else 3e-2), (type(network).__name__, far)


@pytest.mark.parametrize("name", ORDERS)
def test_orders_do_not_depend_on_device_and_precision(name, device):
    similarity, draw = inputs((7, 9), seed=0)
    order = make_order(name, similarity.to(device), (7, 9), draw.to(device))
    assert order.device.type == device
    assert torch.equal(order.cpu(), make_order(name, similarity.double(), (7, 9), draw.double()))


def kept(work, device, network):
    """Bytes that a step needs: on a GPU its peak, on a CPU what is stored for backward, without the weights."""
    if device == "cuda":
        work()  # libraries take their own on first use
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    sizes, alive = {}, []
    weights = {weight.untyped_storage().data_ptr() for weight in network.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # its place is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(sizes.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_pretraining_step_takes_less_memory_than_explicit_masks(precision, device):
    torch.manual_seed(0)
    model = SemAIM(PixelTarget((8, 8)), **{**SMALL, "img_size": 128}).to(device)
    images, draw = torch.randn(8, 3, 128, 128, device=device), torch.rand(8, 256, device=device)
    explicit, needed = ExplicitMasks(model), []
    for loss_of in (lambda: model(images, draw).loss, lambda: explicit(images, draw)):

        def work(loss_of=loss_of):
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                loss = loss_of()
            torch.autograd.grad(loss, [weight for weight in model.parameters() if weight.requires_grad])

        needed.append(kept(work, device, model))
    # A GPU's peak has gradients and temporary tensors too.
    assert 0 < needed[0] < {"cpu": 0.65, "cuda": 0.8}[device] * needed[1], needed


def test_a_global_block_takes_less_memory_than_a_bias_for_all_pairs(device):
    block, maps = build_block("tiny", 512, 1, device)
    ours, plain = (kept(block_pass(variant, block, maps), device, block) for variant in ("ours", "baseline"))
    assert 0 < ours < 0.6 * plain
