"""One optimizer constructor for all tasks: weight decay by parameter, learning rate by depth."""

from collections.abc import Callable, Container, Iterable
from typing import Any

import timm.optim
from mmengine.dist import is_main_process
from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase

from semaim.errors import UserError, nearest

#: What weight decay applies to: weights with two or more dimensions, as in MAE and SemAIM; all but PyTorch's norms, as
#: in ViTDet-B and -L; all, as in ViTDet-H.
DECAYS = ("matrices", "all but norms", "all")


def group_parameters(
    parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    depth_of: Callable[[str], tuple[int, int]] | None = None,
    undecayed: Iterable[str] = (),
    decay: str = "matrices",
    norms: Container[str] = (),
) -> list[dict]:
    """Optimizer parameter groups; groups with equal settings are merged.

    Args:
        parameters: (name, parameter) pairs; those without gradient are left out.
        lr, weight_decay: of the whole model.
        layer_decay: learning rate of a layer relative to the layer above it.
        depth_of: name -> (layer, layers), layer 0 being the embeddings and layer `layers` - 1 the head; the
            learning rate is scaled by layer_decay ** (layers - 1 - layer). Required unless `layer_decay` is 1.
        undecayed: last parts of names without weight decay, whatever `decay` says.
        decay: one of `DECAYS`; "matrices" leaves out all biases and one-dimensional parameters.
        norms: names of the parameters of norms, for "all but norms".

    Returns:
        Groups with `params`, `names`, `lr`, `lr_scale` and `weight_decay`; the highest rates first.
    """
    if decay not in DECAYS:
        raise UserError(f"paramwise_cfg.decay is {decay!r}: {nearest(str(decay), DECAYS)}")
    undecayed = set(undecayed)
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        last = name.rpartition(".")[2]
        left_out = {
            "matrices": parameter.ndim <= 1 or last == "bias",
            "all but norms": name in norms,
            "all": False,
        }
        decayed = 0.0 if left_out[decay] or last in undecayed else weight_decay
        scale = 1.0
        if layer_decay != 1:
            assert depth_of is not None  # required here, see above
            layer, layers = depth_of(name)
            scale = layer_decay ** (layers - 1 - layer)
        group = groups.setdefault(
            (scale, decayed),
            {"params": [], "names": [], "lr": lr * scale, "lr_scale": scale, "weight_decay": decayed},
        )
        group["params"].append(parameter)
        group["names"].append(name)
    # The highest rate first: mmengine logs the first group's.
    return sorted(groups.values(), key=lambda group: -group["lr_scale"])


def layer_depths(model: nn.Module) -> Callable[[str], tuple[int, int]]:
    """Name of a parameter -> (layer, layers), as the encoder inside the model numbers its layers.

    The encoder is the first module with a `get_layer_depth(name)`: `network` of our own models, `backbone` of detectors
    and segmentors. Parameters outside of it, in necks and heads, belong to the last layer.
    """
    found = ((prefix, module) for prefix, module in model.named_modules() if hasattr(module, "get_layer_depth"))
    prefix, encoder = next(found, ("", None))
    if encoder is None:
        raise UserError(f"layer_decay: {type(model).__name__} has no encoder that tells its layers (get_layer_depth)")
    prefix += "." if prefix else ""
    layers = encoder.get_layer_depth("head")[1]

    def depth_of(name: str) -> tuple[int, int]:
        return encoder.get_layer_depth(name[len(prefix) :]) if name.startswith(prefix) else (layers - 1, layers)

    return depth_of


def norm_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters of PyTorch's norms.

    `LayerNorm2d`, which normalises the channels of maps, is not among them: detectron2 uses a custom class there, which
    its rule for norms does not cover.
    """
    norms = (_NormBase, nn.GroupNorm, nn.LayerNorm)  # _NormBase: batch and instance norms
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, norms) and not isinstance(module, LayerNorm2d)
        for name, _ in module.named_parameters(recurse=False)
    }


def group_model(model: nn.Module, lr: float, weight_decay: float, layer_decay: float = 1.0, **rules) -> list[dict]:
    """`group_parameters` for a whole model, with its layers and norms; `rules`: undecayed, decay."""
    depth_of = layer_depths(model) if layer_decay != 1 else None
    norms = norm_parameters(model)
    own = undecayed_of(model)
    if own:
        rules["undecayed"] = (*rules.get("undecayed", ()), *own)
    return group_parameters(model.named_parameters(), lr, weight_decay, layer_decay, depth_of, norms=norms, **rules)


def undecayed_of(model: nn.Module) -> set[str]:
    """Last parts of the names that the encoder inside the model says have no weight decay, such as tables of BEiT's."""
    encoder: Any = next((module for module in model.modules() if hasattr(module, "no_weight_decay")), None)
    return {name.rpartition(".")[2] for name in encoder.no_weight_decay()} if encoder is not None else set()


# A config's paramwise_cfg may have the arguments that the model does not give.
setattr(group_model, "arguments_of", group_parameters)  # noqa: B010


def fuse(optimizer: dict) -> dict:
    """The config of an optimizer, with fused AdamW: the same update, in a third of the time or less."""
    return {"fused": True, **optimizer} if optimizer["type"] == "AdamW" else optimizer


@OPTIMIZERS.register_module(name="LARS")
class Lars(timm.optim.Lars):
    """timm's LARS as MAE's linear probe uses it: learning rates adapt for matrices only, also without weight decay.

    Args:
        params: groups of parameters, as for PyTorch's optimizers.
        lr: learning rate.
        momentum: share of the last step's update that is added to the next.
        weight_decay: factor of the weights that is added to their gradients.
    """

    def __init__(self, params, lr: float = 1.0, momentum: float = 0.9, weight_decay: float = 0.0):
        groups = [
            {**group, "params": chosen, "always_adapt": matrices}
            for group in params
            for matrices in (True, False)
            if (chosen := [parameter for parameter in group["params"] if (parameter.ndim > 1) == matrices])
        ]
        super().__init__(groups, lr, momentum, weight_decay=weight_decay)


@OPTIM_WRAPPERS.register_module()
class DeferredOptimWrapper(OptimWrapper):
    """mmengine's, but the norm of the clipped gradient stays on the device, in `grad_norm`, until it is read.

    Args:
        clip_grad: arguments of `torch.nn.utils.clip_grad_norm_`, such as dict(max_norm=3.0); None: not clipped.
    """

    grad_norm: Tensor | None = None

    def _clip_grad(self) -> None:
        clipped = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if clipped:
            norm = self.clip_func(clipped, **self.clip_grad_kwargs)
            self.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class GroupedOptimizer(DefaultOptimWrapperConstructor):
    """Builds the optimizer by `group_model`; `paramwise_cfg` has its layer_decay, undecayed and decay."""

    arguments_of = group_model

    def __call__(self, model: nn.Module):
        """The optimizer wrapper for a model, which may be wrapped for distributed training."""
        model = getattr(model, "module", model)
        wrapper, optimizer = dict(self.optim_wrapper_cfg), dict(self.optimizer_cfg)
        paramwise = self.paramwise_cfg or {}
        groups = group_model(model, optimizer["lr"], optimizer.get("weight_decay", 0.0), **paramwise)
        if is_main_process():
            for group in groups:
                count = sum(parameter.numel() for parameter in group["params"])
                print_log(
                    f"{count:,} weights in {len(group['params'])} tensors: learning rate {group['lr']:.4g}"
                    f" (x {group['lr_scale']:.3g}), weight decay {group['weight_decay']:g}",
                    logger="current",
                )
        optimizer["params"] = [{k: v for k, v in group.items() if k != "names"} for group in groups]
        wrapper.setdefault("type", "DeferredOptimWrapper")
        wrapper["optimizer"] = OPTIMIZERS.build(fuse(optimizer))
        return OPTIM_WRAPPERS.build(wrapper)
