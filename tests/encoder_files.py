"""Networks of timm with random weights, narrow and shallow, and sources of them, for the tests of encoders."""

import functools
import io
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from semaim.encoders import sources
from semaim.encoders.contract import Encoder, Source
from semaim.encoders.images import preparation_of_arch
from semaim.encoders.timm_vit import default_size, entry

NARROW = {"depth": 2, "embed_dim": 64, "num_heads": 2}
#: Two blocks, of which the second shares its keys and values among heads.
GROUPED = {"depth": 2, "embed_dim": 128, "num_heads": 4, "num_kv_heads": [4, 2]}
#: Of a width that makes the hidden width of its gated MLP even.
GIANT = {"depth": 2, "embed_dim": 96, "num_heads": 3}

#: Architectures by family. A family is what differs in code: class, blocks, attention, positions, pooling.
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", "vit_base_patch32_224", "eva_large_patch14_196", "vit_intern300m_patch14_448"),
    "deit": ("deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"),
    "clip": ("vit_base_patch16_clip_224", "vit_base_patch16_clip_quickgelu_224", "vit_medium_patch16_clip_224"),
    "siglip": ("vit_base_patch16_siglip_224", "vit_base_patch16_siglip_gap_224", "vit_so400m_patch14_siglip_224"),
    "dinov2": ("vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_giant_patch14_dinov2"),
    "tipsv2": ("vit_base_patch14_reg1_tipsv2",),
    "aimv2": ("aimv2_large_patch14_224",),
    "flexivit": ("flexivit_small",),
    "gap": ("vit_medium_patch16_gap_240", "vit_base_patch16_gap_224"),
    "so150m": ("vit_so150m_patch16_reg4_gap_256", "vit_so150m2_patch16_reg1_gap_256"),
    "map": ("vit_so150m_patch16_reg4_map_256",),
    "registers": ("vit_medium_patch16_reg1_gap_256", "vit_betwixt_patch16_reg4_gap_256"),
    "parallel": ("vit_small_patch16_18x2_224", "vit_base_patch16_xp_224", "vit_pwee_patch16_reg1_gap_256"),
    "differential": ("vit_dlittle_patch16_reg1_gap_256", "vit_dpwee_patch16_reg1_gap_256"),
    "rpn": ("vit_base_patch16_rpn_224",),
    "radio": ("vit_base_patch16_radio_v3",),
    "beit3": ("beit3_base_patch16_224",),
    "small": ("test_vit2", "test_vit3", "test_vit4"),
    "beit": ("beit_base_patch16_224", "beitv2_base_patch16_224"),
    "eva": ("eva_giant_patch14_224", "eva_giant_patch14_clip_224"),
    "eva02": ("eva02_tiny_patch14_224", "eva02_base_patch14_448", "eva02_base_patch16_clip_224"),
    "pe": ("vit_pe_core_tiny_patch16_384", "vit_pe_spatial_tiny_patch16_512", "vit_pe_lang_large_patch14_448"),
    "dinov3": ("vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3"),
    "rope": ("vit_betwixt_patch16_rope_reg4_gap_256", "vit_base_patch16_rope_reg1_gap_256"),
    "naver": ("vit_small_patch16_rope_224", "vit_small_patch16_rope_ape_224"),
    "mixed": ("vit_small_patch16_rope_mixed_224", "vit_small_patch16_rope_mixed_ape_224"),
    "sapiens2": ("vit_base_patch16_sapiens2",),
    "lingbot": ("vit_small_patch16_lingbot",),
}  # fmt: skip
ARCHS = [arch for archs in FAMILIES.values() for arch in archs]
#: The first of each family.
FIRST = [archs[0] for archs in FAMILIES.values()]
#: With tables of relative positions, which timm does not resample in the forward pass.
TABLES = FAMILIES["beit"]


def narrow(arch: str) -> dict[str, Any]:
    """Arguments for a small network of an architecture."""
    return dict(GROUPED if arch.endswith("sapiens2") else GIANT if arch == "vit_giant_patch14_dinov2" else NARROW)


def random_state(network: torch.nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Weights away from where they start: no norm is 1, no layer scale tiny, no register, table or bias 0."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in network.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        last = name.rpartition(".")[2]
        if last == "gamma" or last.startswith("gamma_") or last == "weight" and tensor.ndim == 1:
            state[name] = 1 + 0.3 * noise
        elif last == "weight":
            state[name] = noise * (2 / tensor[0].numel()) ** 0.5
        else:
            state[name] = 0.4 * noise
    return state


@functools.lru_cache(maxsize=4)
def _state(arch: str, wide: bool) -> dict[str, Tensor]:
    args = {"depth": 2} if wide else narrow(arch)
    return random_state(timm.create_model(arch, num_classes=0, **args))


def state_of(arch: str, wide: bool = False) -> dict[str, Tensor]:
    """Random weights of a small network of an architecture, at its own image size; `wide`: of its own width."""
    return dict(_state(arch, wide))


def source_of(arch: str, wide: bool = False) -> Source:
    """These weights as a source, as `open_source` makes it."""
    path = Path(f"{arch}.pth")
    args = {"depth": 2} if wide else narrow(arch)
    return sources.of_timm(path.name, path, arch, args, preparation_of_arch(arch, path), state_of(arch, wide))


def loaded(arch: str, wide: bool = False, **changes: Any) -> Encoder:
    """The suite's encoder with these weights; `changes` as for `build`."""
    source = source_of(arch, wide)
    encoder = source.build(**changes)
    encoder.load(source)
    return encoder.eval()


def reference(arch: str, size: tuple[int, int] | None = None, wide: bool = False, **options: Any) -> torch.nn.Module:
    """timm's network for images of a size with these weights, which timm itself filters and loads strictly."""
    args = {"depth": 2} if wide else narrow(arch)
    overlay = {"state_dict": state_of(arch, wide), "num_classes": 0}
    size = size or default_size(arch)
    network = timm.create_model(
        arch, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, img_size=size, **args, **options
    )
    return network.eval()


def sizes_of(arch: str) -> list[tuple[int, int]]:
    """Image sizes to compare at: the architecture's own, unless it is large, a small square, an oblong."""
    patch, (height, width) = entry(arch).arguments.get("patch_size", 16), default_size(arch)
    own = (height, width) if height * width < 1500 * patch**2 else (12 * patch, 12 * patch)
    return [own, (6 * patch, 6 * patch), (5 * patch, 9 * patch)]


def images_of(size: tuple[int, int], images: int = 1, seed: int = 1) -> Tensor:
    """Random images of (height, width) pixels."""
    return torch.randn(images, 3, *size, generator=torch.Generator().manual_seed(seed))


def checkpoint_of(network: torch.nn.Module, **config: Any) -> dict:
    """A run's checkpoint, saved and read again, as `semaim.engine.saving` writes it."""
    file = io.BytesIO()
    torch.save({"format": "semaim", "model": network.state_dict(), "config": config}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
