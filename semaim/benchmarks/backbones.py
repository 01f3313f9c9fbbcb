"""Whole backbones of dense tasks beside the references' own: ViTDet's by detectron2, UperNet's by mmseg."""

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from semaim import compat
from semaim.benchmarks.measuring import alternate, check_equal, cpu_peak, gpu_peak
from semaim.benchmarks.references import load_detectron2
from semaim.benchmarks.rows import Row
from semaim.checkpoints.dialects import INERT
from semaim.errors import UserError
from semaim.models.segvit import SegmentationViT
from semaim.models.vit import LAYER_NORM_EPS, SIZES
from semaim.models.vitdet import SimpleFeaturePyramid, ViTDet
from semaim.parity import mmseg, vitdet
from semaim.places import to_install

#: Largest relative differences of maps and gradients, both in fp32, before anything is timed.
MAP_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3

Maps = tuple[Tensor, ...]


class Pair(NamedTuple):
    """Both backbones with the same weights, on the CPU."""

    ours: nn.Module
    theirs: nn.Module
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]  #: their tensors by name -> ours


class WithPyramid(nn.ModuleDict):
    """Our encoder and pyramid: images (B, 3, H, W) -> levels of strides 4, 8, 16 and 32."""

    def forward(self, images: Tensor) -> Maps:
        """The levels, finest first."""
        return self["pyramid"](self["net"](images))


def detectron2_pair(model: str, img_size: int, folder: str) -> Pair:
    """ViTDet's encoder and pyramid at the recipe's settings; the extra level, a slice of the last one, is left out."""
    code, sizes = load_detectron2(folder), SIZES[model]
    encoder, pyramid = ViTDet(model, img_size), SimpleFeaturePyramid(sizes["embed_dim"], extra_level=False)
    windows = [index for index in range(sizes["depth"]) if index not in encoder.global_blocks]
    net = code.ViT(
        img_size=img_size,
        **sizes,
        norm_layer=functools.partial(nn.LayerNorm, eps=LAYER_NORM_EPS),
        window_size=encoder.window_size,
        window_block_indexes=windows,
        use_rel_pos=True,
    )
    theirs = code.SimpleFeaturePyramid(net, "last_feat", 256, (4.0, 2.0, 1.0, 0.5))
    return Pair(WithPyramid({"net": encoder, "pyramid": pyramid}), theirs, vitdet.convert)


def mmseg_pair(model: str, img_size: int) -> Pair:
    """The encoder of mmseg's MAE with UperNet, and ours, at the recipe's settings.

    Raises:
        UserError: mmseg is not installed.
    """
    if find_spec("mmseg") is None:
        raise UserError(f"upernet: mmsegmentation is not installed: {to_install('seg')}")
    compat.install()
    from mmseg.models.backbones import MAE

    sizes, ours = SIZES[model], SegmentationViT(model, img_size, layer_scale=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of meshgrid
        theirs = MAE(
            img_size=(img_size, img_size),
            embed_dims=sizes["embed_dim"],
            num_layers=sizes["depth"],
            num_heads=sizes["num_heads"],
            norm_cfg=dict(type="LN", eps=LAYER_NORM_EPS),
            out_indices=ours.out_blocks,
            init_values=1.0,
        )

    def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {mmseg.our_name(name): tensor for name, tensor in tensors.items() if not name.endswith(INERT)}

    return Pair(ours, theirs, convert)


def build_pair(kind: str, model: str, img_size: int, folder: str | None) -> Pair:
    """The `Pair` of "detectron2" or "mmseg", with random weights; zero ones, such as relative positions, too.

    Raises:
        UserError: the image size does not fit, or the reference is not there.
    """
    if img_size < 32 or img_size % 32:
        raise UserError(f"--img-size {img_size}: give a multiple of 32")
    torch.manual_seed(0)
    if kind == "detectron2":
        assert folder is not None
        pair = detectron2_pair(model, img_size, folder)
    else:
        pair = mmseg_pair(model, img_size)
    with torch.no_grad():
        for parameter in pair.theirs.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    pair.ours.load_state_dict(pair.convert(dict(pair.theirs.state_dict())))
    return pair


def maps_of(out: Tensor | Mapping[str, Tensor] | Iterable[Tensor]) -> Maps:
    """A backbone's maps, whether it returns them in a dict or a tuple."""
    return tuple(out.values() if isinstance(out, Mapping) else out)


def passing(network: nn.Module, images: Tensor, precision: str) -> Callable[[], tuple[Maps, Maps]]:
    """Forward and backward of a backbone: its maps, and the gradients of its parameters for noise on the maps."""
    weights = [parameter for parameter in network.parameters() if parameter.requires_grad]
    noise: list[Tensor] = []
    device = images.device.type

    def work() -> tuple[Maps, Maps]:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            maps = maps_of(network(images))
        if not noise:
            generator = torch.Generator(device).manual_seed(0)
            noise.extend(torch.randn(one.shape, generator=generator, device=device, dtype=one.dtype) for one in maps)
        return maps, torch.autograd.grad(maps, weights, noise)

    return work


def build_pass(
    variant: str, kind: str, model: str, img_size: int, batch: int, device: str, precision: str, folder: str | None
) -> Callable[[], object]:
    """The pass of "ours" or "theirs", for a separate process."""
    network = getattr(build_pair(kind, model, img_size, folder), variant).to(device)
    return passing(network, torch.randn(batch, 3, img_size, img_size, device=device), precision)


def check_parity(pair: Pair, images: Tensor) -> float:
    """Largest relative difference of the maps of both, in fp32; `UserError` if they or the gradients differ."""
    (maps, gradients), (their_maps, their_gradients) = (
        passing(network, images, "fp32")() for network in (pair.ours, pair.theirs)
    )
    difference = check_equal("maps", maps, their_maps, MAP_TOLERANCE, "the reference")

    def named(network: nn.Module, tensors: Maps) -> dict[str, Tensor]:
        names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        return dict(zip(names, tensors, strict=True))

    found, wanted = named(pair.ours, gradients), pair.convert(named(pair.theirs, their_gradients))
    if found.keys() != wanted.keys():
        raise UserError(f"trained parameters of only one of the two: {sorted(found.keys() ^ wanted.keys())[:3]}")
    check_equal("gradients", found.values(), [wanted[name] for name in found], GRADIENT_TOLERANCE, "the reference")
    return difference


def backbone(
    kind: str, model: str, img_size: int, batch: int, device: str, precision: str, repeats: int,
    folder: str | None = None,
) -> list[Row]:  # fmt: skip
    """Time and memory of a whole backbone, forward and backward, beside the reference's, in the same precision.

    Args:
        kind: "detectron2" (encoder and pyramid, in windows except for four blocks) or "mmseg" (encoder).
        model: a name of `SIZES`.
        img_size: side in pixels.
        batch: images.
        device, precision: of both.
        repeats: turns.
        folder: a clone of detectron2.
    """
    where, target = "GPU" if device == "cuda" else "CPU", torch.device(device)
    pair = build_pair(kind, model, img_size, folder)
    networks = pair.ours.to(device), pair.theirs.to(device)
    images = torch.randn(batch, 3, img_size, img_size, device=device)
    difference = check_parity(pair, images)
    sizes = kind, model, img_size, batch, device, precision, folder
    if where == "GPU":
        peaks = []
        for network in networks:
            for other in networks:
                other.to("cpu" if other is not network else device)
            work = passing(network, images, precision)
            work()
            peaks.append(gpu_peak(work, target))
        networks = pair.ours.to(device), pair.theirs.to(device)
    else:
        peaks = [cpu_peak(build_pass, variant, *sizes) for variant in ("ours", "theirs")]
    ours, theirs = (passing(network, images, precision) for network in networks)
    timing = alternate(ours, theirs, target, repeats, warmup=2)
    what = {
        "detectron2": "ViTDet's encoder and pyramid against detectron2's",
        "mmseg": "UperNet's encoder against mmseg's MAE",
    }[kind]
    details = dict(zip(("kind", "model", "img_size", "batch", "device", "precision", "reference"), sizes, strict=True))
    common: dict[str, Any] = {"loss_difference": difference, "details": {**details, "repeats": repeats}}
    return [
        Row(
            f"{what}, ViT-{model} {img_size} px, forward + backward", where, "ms", ours=timing.ours * 1e3,
            baseline=timing.baseline * 1e3, ratio=timing.ratio, spread=timing.spread, **common,
        ),
        Row(
            "its peak memory", where, "MB", at_least=False, ours=peaks[0] / 1e6, baseline=peaks[1] / 1e6,
            ratio=peaks[0] / peaks[1], **common,
        ),
    ]  # fmt: skip
