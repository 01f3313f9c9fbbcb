import functools
import re
import threading

import pytest
import timm
import torch
from torch import Tensor

from semaim.encoders import inferring
from semaim.encoders.inferring import Inferred, architectures, infer, tags

pytestmark = pytest.mark.slow  # many small tests, together most of a minute

FAMILIES = (
    "vit_base_patch16_224", "vit_base_patch16_clip_224", "vit_base_patch16_siglip_256", "vit_base_patch14_reg4_dinov2",
    "deit3_small_patch16_224", "deit_base_distilled_patch16_224", "beit_base_patch16_224", "eva02_base_patch14_448",
    "vit_base_patch16_dinov3", "vit_base_patch16_rope_mixed_224", "vit_base_patch16_sapiens2",
    "aimv2_large_patch14_224", "vit_pe_core_base_patch16_224", "vit_so400m_patch14_siglip_378",
)  # fmt: skip
#: Every fifth architecture, and one of each family.
SAMPLE = sorted({*architectures()[::5], *FAMILIES})
#: Pairs of architectures of which the first's tensors are the second's too, and whether they compute the same.
PAIRS = (
    ("vit_base_patch16_224", "deit_base_patch16_384", True),
    ("vit_tiny_patch16_224", "deit_tiny_patch16_224", True),
    ("vit_small_patch16_384", "deit_small_patch16_224", True),
    ("beit_base_patch16_224", "beitv2_base_patch16_224", True),
    ("deit3_small_patch16_384", "deit3_small_patch16_224", True),
    ("eva02_tiny_patch14_336", "eva02_tiny_patch14_224", True),
    ("eva02_base_patch14_448", "eva02_base_patch14_224", True),
    ("vit_base_patch16_siglip_512", "vit_base_patch16_siglip_224", True),
    ("vit_base_patch16_clip_384", "vit_base_patch16_clip_224", True),
    ("vit_base_patch16_clip_224", "vit_base_patch16_clip_quickgelu_224", False),
    ("vit_base_patch32_clip_256", "vit_base_patch32_clip_quickgelu_224", False),
    ("vit_base_patch16_gap_224", "vit_base_patch16_siglip_gap_224", False),
    ("vit_small_patch16_lingbot", "vit_small_patch16_dinov3_qkvb", False),
    ("vit_large_patch16_siglip_256", "vit_large_patch16_siglip_512", False),
)


@functools.lru_cache
def cached_state(arch: str, **kwargs) -> dict[str, Tensor]:
    with inferring.Unfilled(), torch.device("meta"):
        return dict(timm.create_model(arch, **kwargs).state_dict())


def state_of(arch: str, **kwargs) -> dict[str, Tensor]:
    return dict(cached_state(arch, **kwargs))


def outputs(*archs: str) -> list[Tensor]:
    """What networks of one block give for small images, all with the weights of the first."""
    size = 4 * int(re.search(r"patch(\d+)", archs[0])[1])
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, size, size, generator=generator)
    found, state = [], {}
    for arch in archs:
        network = timm.create_model(arch, depth=1, img_size=size, num_classes=0).eval()
        if not state:
            for name, tensor in network.state_dict().items():
                state[name] = torch.randn(tensor.shape, generator=generator) * (0.05 if tensor.ndim > 1 else 0.3)
        network.load_state_dict(state)
        with torch.no_grad():
            found.append(network(images))
    return found


def check(arch: str) -> Inferred:
    """A file of an architecture gives it or one that computes the same, or is said to be ambiguous."""
    found = infer(state_of(arch))
    assert arch in found.candidates
    assert set(found.candidates) <= set(architectures())
    if found.arch is None:
        assert found.differ and not found.args
    else:
        assert found.arch in found.candidates and not found.differ and not found.args
    return found


def test_names():
    assert len(set(architectures())) == len(architectures()) > 200
    assert {tag.partition(".")[0] for tag in tags()} <= set(architectures())
    assert "vit_base_patch16_224.mae" in tags() and "vit_7b_patch16_dinov3.sat493m" in tags()
    assert len(set(tags())) == len(tags()) > 400


@pytest.mark.skipif(timm.__version__ != "1.0.31", reason="counts of timm 1.0.31")
def test_counts():
    assert (len(architectures()), len(tags())) == (251, 429)


def test_every_architecture_is_recorded():
    recipes = inferring.recipes()
    assert tuple(recipes) == architectures()
    recipe = recipes["eva02_large_patch14_448"]
    assert recipe.size == (448, 448) and recipe.patch == (14, 14) and recipe.kwargs["num_heads"] == 16


@pytest.mark.parametrize("arch", FAMILIES)
def test_unfilled_networks_have_the_same_tensors(arch):
    with torch.device("meta"):
        state = timm.create_model(arch).state_dict()
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in state_of(arch).items()
    }


def test_sample():
    assert len(SAMPLE) >= 60
    for arch in SAMPLE:
        check(arch)


@pytest.mark.slow
def test_all():
    others = {}
    for arch in architectures():
        found = check(arch).arch
        if found not in (None, arch):
            others[arch] = found
    for arch, found in others.items():
        first, second = outputs(arch, found)
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize(("arch", "other", "same"), PAIRS)
def test_pairs(arch, other, same):
    found = infer(state_of(arch))
    assert {arch, other} <= set(found.candidates)
    first, second = outputs(arch, other)
    assert torch.allclose(first, second, rtol=1e-5, atol=1e-6) == same
    if not same:
        assert found.arch is None and found.differ
    elif found.arch not in (None, arch, other):
        # The architecture is another only where it computes the same.
        assert torch.allclose(first, outputs(arch, found.arch)[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arch", FAMILIES)
def test_another_tensor_leaves_none(arch):
    state = state_of(arch)
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    name = next(name for name in state if name.startswith(f"blocks.{depth - 1}.attn.proj"))
    tensor = state.pop(name)
    assert infer(state) == Inferred(None, {}, (), "")
    assert infer(state | {name.replace(".attn.", ".attention."): tensor}).candidates == ()
    assert infer(state | {name: torch.empty(*tensor.shape, 2, device="meta")}).candidates == ()
    assert infer(state | {name: tensor, "norm_more.weight": tensor}).candidates == ()
    assert infer(state | {name: tensor}).candidates


@pytest.mark.parametrize(
    ("arch", "found"),
    [
        ("vit_base_patch14_reg4_dinov2", "vit_base_patch14_reg4_dinov2"),
        ("vit_base_patch14_dinov2", "vit_base_patch14_dinov2"),
        ("vit_base_patch16_dinov3", "vit_base_patch16_dinov3"),
        ("eva02_base_patch14_448", "eva02_base_patch14_448"),
        ("eva02_base_patch14_224", "eva02_base_patch14_224"),
        ("deit3_base_patch16_224", "deit3_base_patch16_224"),
        ("deit_base_distilled_patch16_384", "deit_base_distilled_patch16_384"),
        ("vit_large_patch16_384", "vit_large_patch16_384"),
        ("beitv2_base_patch16_224", "beit_base_patch16_224"),  # the same network
        ("vit_base_patch16_224.mae", "deit_base_patch16_224"),  # the same network, and the first of its names
        ("vit_so400m_patch14_siglip_378", "vit_so400m_patch14_siglip_378"),
        ("flexivit_base", "flexivit_base"),  # its class token has no place in the table
    ],
)
def test_determined(arch, found):
    inferred = infer(state_of(arch))
    assert (inferred.arch, inferred.args) == (found, {})


@pytest.mark.parametrize(
    ("arch", "differ"),
    [
        ("vit_base_patch16_clip_quickgelu_224", "activation (GELU, QuickGELU)"),
        ("vit_large_patch16_siglip_512", "activation (GELU, GELUTanh)"),
        ("vit_base_patch16_siglip_gap_384", "heads (12, 16)"),
        ("vit_base_patch16_lingbot", "pooling (avg, token)"),
    ],
)
def test_ambiguous(arch, differ):
    found = infer(state_of(arch))
    assert (found.arch, found.args, found.differ) == (None, {}, differ)


def test_image_size():
    state = state_of("vit_base_patch16_224")
    at_384 = infer(state_of("vit_base_patch16_224", img_size=384))
    assert (at_384.arch, at_384.args) == ("deit_base_patch16_384", {})
    at_512 = infer(state_of("vit_base_patch16_224", img_size=512))
    assert (at_512.arch, at_512.args) == ("deit_base_patch16_224", {"img_size": 512})
    assert state_of(at_512.arch, **at_512.args)["pos_embed"].shape == (1, 1025, 768)
    # A class token and 14 x 13 patches
    oblong = infer(state | {"pos_embed": torch.empty(1, 183, 768, device="meta")})
    assert oblong.arch is None and "vit_base_patch16_224" in oblong.candidates and "image size" in oblong.differ
    assert infer({name: tensor for name, tensor in state.items() if name != "pos_embed"}).candidates == ()


def test_image_size_of_bias_tables():
    found = infer(state_of("beitv2_large_patch16_224", img_size=256))
    assert (found.arch, found.args) == ("beit_large_patch16_224", {"img_size": 256})
    assert infer(state_of("beitv2_large_patch16_224", img_size=512)).arch == "beit_large_patch16_512"
    state = state_of("beit_base_patch16_224")
    heads = {name: tensor[:, :6] if name.endswith("bias_table") else tensor for name, tensor in state.items()}
    assert infer(heads).candidates == ()
    mixed = state | {"blocks.3.attn.relative_position_bias_table": torch.empty(963, 12, device="meta")}
    assert infer(mixed).arch is None


def test_image_size_without_a_table():
    found = infer(state_of("vit_base_patch16_dinov3", img_size=512))
    assert (found.arch, found.args) == ("vit_base_patch16_dinov3", {})


@pytest.mark.parametrize("arch", ["deit_base_distilled_patch16_224", "beit_base_patch16_224"])
def test_heads_and_other_parts_decide_nothing(arch):
    expected = infer(state_of(arch))
    assert expected.arch == arch
    assert infer(state_of(arch, num_classes=0)) == expected
    assert infer(state_of(arch, num_classes=7)) == expected
    more = {name: torch.empty(1, 1, 768) for name in ("mask_token", "lm_head.weight", "decoder_blocks.0.norm1.weight")}
    index = {"blocks.0.attn.relative_position_index": torch.empty(197, 197)}
    assert infer(state_of(arch) | more | index) == expected


def test_norm_after_pooling_is_another_architecture():
    state = state_of("vit_base_patch16_224")
    pooled = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: state[name] for name in state}
    assert infer(pooled).candidates == ()


@pytest.mark.parametrize("state", [{}, {"weight": torch.zeros(3)}, {"patch_embed.proj.weight": torch.zeros(3)}])
def test_no_encoder(state):
    assert infer(state) == Inferred(None, {}, (), "")


def test_timm_stays_as_it_was():
    modules = [getattr(timm.models, module) for module in inferring.MODULES]
    before = [dict(vars(module)) for module in modules]
    inferring.recipes.cache_clear()
    inferring.layout.cache_clear()
    state = state_of("deit_tiny_patch16_224")
    found, built = [], []
    threads = [threading.Thread(target=lambda: found.append(infer(state))) for _ in range(2)]
    for thread in threads:
        thread.start()
    built.append(timm.create_model("deit_tiny_patch16_224", depth=1))
    for thread in threads:
        thread.join()
    assert found[0] == found[1] and found[0].arch == "deit_tiny_patch16_224"
    assert built[0].cls_token.device.type == "cpu" and built[0].blocks[0].norm1.weight.eq(1).all()
    assert [dict(vars(module)) for module in modules] == before
