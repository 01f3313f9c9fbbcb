"""The code of the references themselves, SemAIM's and detectron2's, run where a user has a clone.

None of it is in this repository. A clone is named by `--reference DIR`, and running its code is what the flag asks for.
Only the files that the measured networks need are imported. Where these need what today's libraries or this machine
lack, there are stand-ins:

* SemAIM (tried with bc8bf14): `torch._six`, which torch 1.13 and later do not have; on a CPU `Tensor.cuda` and
  `torch.cuda.synchronize`, which then do nothing. timm's layers are the installed version's, the same operations.
* detectron2 (tried with backbone/vit.py of 0818132): the packages' `__init__`, which import compiled operators;
  fvcore, of which only initial weights are used, and they are replaced; `utils.env`, `utils.comm` and `fpn`, of which
  one name each is imported. Blocks, convolutions and norms are detectron2's own.
"""

import contextlib
import functools
import importlib
import io
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from semaim.errors import UserError
from semaim.models import SemAIM
from semaim.parity.semaim import OFFICIAL_ORDERS

#: Repository -> (the file that is needed first, packages that are its folders).
SEMAIM = "github.com/skyoux/SemAIM"
DETECTRON2 = "github.com/facebookresearch/detectron2"
FILES = {
    SEMAIM: ("models/models_semaim.py", ("models", "util", "engines")),
    DETECTRON2: (
        "detectron2/modeling/backbone/vit.py",
        ("detectron2", "detectron2/layers", "detectron2/modeling", "detectron2/modeling/backbone"),
    ),
}

#: The official model's tables of boxes are written for this many patches along a side, and smaller grids fail.
LEAST_SIDE = 14


def stand_in(name: str, **content: Any) -> ModuleType:
    """A module with the given names."""
    module = ModuleType(name)
    vars(module).update(content)
    return module


@contextlib.contextmanager
def importing(folder: str, repository: str, stand_ins: Mapping[str, ModuleType]) -> Iterator[None]:
    """Context manager in which a clone's modules can be imported; `sys.modules` is afterwards as it was before.

    Raises:
        UserError: the folder is no clone of the repository, or its code cannot be imported.
    """
    first, packages = FILES[repository]
    if not (Path(folder) / first).is_file():
        raise UserError(f"--reference {folder}: there is no {first} in it: give a clone of {repository}")
    tops = {package.split("/")[0] for package in packages}

    def taken() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] in tops or name in stand_ins]

    before = {name: sys.modules.pop(name) for name in taken()}
    for package in packages:  # not by sys.path: a regular package of the same name would come first
        name = package.replace("/", ".")
        sys.modules[name] = stand_in(name, __path__=[str(Path(folder) / package)])
    sys.modules.update(stand_ins)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that timm and torch have moved
            yield
    except (ImportError, AttributeError, SyntaxError) as error:
        raise UserError(f"--reference {folder}: its code cannot be imported here: {error}") from None
    finally:
        for name in taken():
            del sys.modules[name]
        sys.modules.update(before)


class Official(NamedTuple):
    """What the official code of SemAIM defines."""

    network: Callable[..., nn.Module]  #: `AimViT`
    train_one_epoch: Callable[..., dict]
    scaler: Callable[[], Any]  #: loss scaling, with clipping


@functools.lru_cache(maxsize=1)
def load_semaim(folder: str) -> Official:
    """The official model and training loop in a clone of skyoux/SemAIM."""
    with importing(folder, SEMAIM, {"torch._six": stand_in("torch._six", inf=float("inf"))}):
        models, engine, misc = (
            importlib.import_module(name) for name in ("models.models_semaim", "engines.engine_pretrain", "util.misc")
        )
        return Official(models.AimViT, engine.train_one_epoch, misc.NativeScalerWithGradNormCount)


@functools.lru_cache(maxsize=1)
def load_detectron2(folder: str) -> ModuleType:
    """detectron2's module `modeling.backbone.vit` in a clone."""

    def nothing(*args: object) -> None:
        """In place of initial weights and checks."""

    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    env, comm = stand_in("env", TORCH_VERSION=version), stand_in("comm", get_world_size=lambda: 1)
    weights = stand_in("weight_init", c2_msra_fill=nothing, c2_xavier_fill=nothing)
    stand_ins = {
        "detectron2.utils": stand_in("utils", env=env, comm=comm),
        "detectron2.utils.env": env,
        "detectron2.utils.comm": comm,
        "detectron2.modeling.backbone.fpn": stand_in("fpn", _assert_strides_are_log2_contiguous=nothing),
        "fvcore": stand_in("fvcore"),
        "fvcore.nn": stand_in("fvcore.nn", weight_init=weights),
        "fvcore.nn.weight_init": weights,
        "fvcore.nn.distributed": stand_in("distributed", differentiable_all_reduce=nothing),
    }
    stand_ins["fvcore"].nn = stand_ins["fvcore.nn"]  # type: ignore[attr-defined]
    with importing(folder, DETECTRON2, stand_ins):
        layers = sys.modules["detectron2.layers"]
        for file, name in (
            ("shape_spec", "ShapeSpec"), ("wrappers", "Conv2d"), ("batch_norm", "get_norm"), ("blocks", "CNNBlockBase")
        ):  # fmt: skip
            setattr(layers, name, getattr(importlib.import_module(f"detectron2.layers.{file}"), name))
        return importlib.import_module("detectron2.modeling.backbone.vit")


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Context manager in which the official code, which calls `.cuda()`, also runs on a CPU."""
    if device.type == "cuda":
        yield
        return
    with (
        patch.object(torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor),
        patch.object(torch.cuda, "synchronize", lambda *args: None),
    ):
        yield


def official_model(folder: str, model: SemAIM) -> nn.Module:
    """The official model with the sizes, the order and the weights of ours, for the recipe's target.

    Raises:
        UserError: the official code does not have the order, or fails for so few patches.
    """
    names = {ours: official for official, ours in OFFICIAL_ORDERS.items()}
    if model.order not in names:
        raise UserError(f"--reference: the official code has no order {model.order}: choose from {', '.join(names)}")
    if min(model.grid) < LEAST_SIDE or model.grid[0] != model.grid[1]:
        raise UserError(f"--reference: the official model needs {LEAST_SIDE} x {LEAST_SIDE} patches or more")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of meshgrid
        network = load_semaim(folder).network(
            img_size=model.grid[0] * model.patch_size[0],
            patch_size=model.patch_size[0],
            embed_dim=model.embed_dim,
            depth=model.depth,
            num_heads=model.num_heads,
            mlp_ratio=model.mlp_ratio,
            permutation_type=names[model.order],
            query_depth=len(model.query_blocks),
            prediction_head_type="MLP",
            gaussian_kernel_size=9,
            gaussian_sigma=1,
        )
    weights = dict(model.state_dict())
    missing, unexpected = network.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"gaussian_blur.weight"}:
        raise UserError(f"--reference {folder}: its parameters are others than ours: {[*missing, *unexpected][:3]}")
    return network.to(next(model.parameters()).device)


def official_loss(network: nn.Module, images: Tensor, draw: Tensor) -> Tensor:
    """The official loss, in fp32, with given random numbers: images (B, 3, H, W), draw (B, L) -> scalar."""

    def given(*size: Any, **kwargs: Any) -> Tensor:
        return draw.clone()

    with on_device(images.device), patch.object(torch, "rand", given):
        with torch.no_grad():
            _, similarity, _ = network(images, forward_encoder=True)
        return network(images, None, similarity)[0]


def official_step(folder: str, network: Any, images: Tensor) -> Callable[[], dict]:
    """The official training step: `train_one_epoch` with one batch, as main_pretrain.py calls it for the recipe.

    fp16 autocast and loss scaling on a GPU, fp32 on a CPU; AdamW on two groups of parameters, clipping at 3, the loss
    and the norm copied to the host. The optimizer's groups are by timm's function, which has been renamed since. What
    it prints is discarded. Its logging of an epoch is in each step, which takes less than a millisecond. The step
    returns the epoch's averages by name.
    """
    code, device = load_semaim(folder), images.device
    optimizer = torch.optim.AdamW(param_groups_weight_decay(network, 0.05), lr=1e-4, betas=(0.9, 0.95))
    args = SimpleNamespace(
        epochs=800, warmup_epochs=30, lr=1e-4, min_lr=0.0, accum_iter=1, use_ema_model=False, predict_feature="none",
        permutation_type=network.permutation_type, attention_type="cls",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        scaler = code.scaler() if device.type == "cuda" else None

    def step() -> dict:
        with on_device(device), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch.cuda.amp.autocast has a new name
            return code.train_one_epoch(network, [(images, None)], optimizer, device, 30, scaler, 3.0, args=args)

    return step
