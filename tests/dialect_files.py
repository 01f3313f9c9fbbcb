"""Files of every dialect with random weights, for the tests of checkpoints."""

import argparse
import pickle

import torch
from safetensors.torch import save_file

from semaim.models import MAE, PixelTarget, SemAIM
from semaim.models.classifier import Classifier
from semaim.models.vit import VisionTransformer

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
HEAD = ("head", "fc_norm")


class Call:
    """Pickles to a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def random_state(model):
    """The state of a model, every float of it random."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn_like(tensor).abs())
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def random_states():
    """Weights of our models, by what they are."""
    torch.manual_seed(0)
    target = PixelTarget((8, 8), blur_kernel=0)
    return {
        "encoder": random_state(VisionTransformer(**SIZES)),
        "semaim": random_state(SemAIM(target, guide="ema", **SIZES)),
        "mae": random_state(MAE(target, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, **SIZES)),
        "tuned": random_state(Classifier(5, "avg", **SIZES)),
        "tuned_cls": random_state(Classifier(5, "cls", **SIZES)),
        "probe": random_state(Classifier(5, "cls", probe=True, **SIZES)),
    }


def mmpretrain_decoder(state):
    """mmpretrain's names of MAE's decoder of one block, written out one by one."""
    pairs = {
        "neck.decoder_embed": "decoder_embed", "neck.ln1": "decoder_norm", "neck.decoder_pred": "decoder_pred",
        "neck.decoder_blocks.0.ln1": "decoder_blocks.0.norm1", "neck.decoder_blocks.0.ln2": "decoder_blocks.0.norm2",
        "neck.decoder_blocks.0.attn.qkv": "decoder_blocks.0.attn.qkv",
        "neck.decoder_blocks.0.attn.proj": "decoder_blocks.0.attn.proj",
        "neck.decoder_blocks.0.ffn.layers.0.0": "decoder_blocks.0.mlp.fc1",
        "neck.decoder_blocks.0.ffn.layers.1": "decoder_blocks.0.mlp.fc2",
    }  # fmt: skip
    renamed = {"neck.mask_token": state["mask_token"], "neck.decoder_pos_embed": state["decoder_pos_embed"]}
    for theirs, ours in pairs.items():
        renamed |= {f"{theirs}.{kind}": state[f"{ours}.{kind}"] for kind in ("weight", "bias")}
    return renamed


def mmpretrain(state):
    """mmpretrain's names, written out one by one."""
    renamed = {
        "backbone.cls_token": state["cls_token"],
        "backbone.pos_embed": state["pos_embed"],
        "backbone.patch_embed.projection.weight": state["patch_embed.proj.weight"],
        "backbone.patch_embed.projection.bias": state["patch_embed.proj.bias"],
        "backbone.ln1.weight": state["norm.weight"],
        "backbone.ln1.bias": state["norm.bias"],
    }
    for block in range(2):
        for theirs, ours in {
            "ln1": "norm1", "attn.qkv": "attn.qkv", "attn.proj": "attn.proj", "ln2": "norm2",
            "ffn.layers.0.0": "mlp.fc1", "ffn.layers.1": "mlp.fc2",
        }.items():  # fmt: skip
            for kind in ("weight", "bias"):
                renamed[f"backbone.layers.{block}.{theirs}.{kind}"] = state[f"blocks.{block}.{ours}.{kind}"]
    return renamed


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def write(folder, dialect, states):
    """A file of a dialect, and the weights that are to be found in it."""
    encoder, path = states["encoder"], folder / "file.pth"
    content = {
        "semaim": {"format": "semaim", "model": states["semaim"], "epoch": 3, "config": None},
        "semaim tuned": {"format": "semaim", "model": states["tuned"], "classes": list("abcde"), "config": None},
        "semaim probe": {"format": "semaim", "model": states["probe"], "config": None},
        "official": {"model": "aim_base", "state_dict": prefixed("module.", states["semaim"]), "epoch": 3,
                     "optimizer": {"state": {}}},
        "mae": {"model": states["mae"], "epoch": 3, "optimizer": {"state": {}}},
        "mae tuned": {"model": states["tuned"], "args": argparse.Namespace(lr=1), "epoch": 3},
        "timm": states["tuned_cls"],
        "dino": encoder,
        "dino full": {"student": prefixed("module.backbone.", encoder), "epoch": 3,
                      "teacher": {**prefixed("backbone.", encoder), "head.mlp.0.weight": torch.zeros(3, 3)}},
        "mmpretrain": {"meta": {"epoch": 3}, "state_dict": {**mmpretrain(encoder), "neck.other": torch.zeros(3),
                                                              "backbone.layers.0.attn.q_bias": torch.ones(32)}},
        "mmpretrain mae": {"meta": {"epoch": 3}, "state_dict": {**mmpretrain(states["mae"]),
                                                                **mmpretrain_decoder(states["mae"])}},
        "mmpretrain tuned bare": {**{n.removeprefix("backbone."): t for n, t in mmpretrain(encoder).items()},
                                  "head.layers.head.weight": states["tuned_cls"]["head.weight"]},
        "mmpretrain old": {"meta": {}, "state_dict": {n.replace("backbone.ln1", "backbone.norm1"): t
                                                      for n, t in mmpretrain(encoder).items()}},
        "mmpretrain bare": {n.removeprefix("backbone."): t for n, t in mmpretrain(encoder).items()},
        "detectron2": {"model": {**prefixed("backbone.net.", encoder), "backbone.simfp_2.0.weight": torch.zeros(3),
                                 "roi_heads.box_head.fc1.weight": torch.zeros(3)}, "iteration": 9},
        "segmentor": {"meta": {}, "state_dict": {**prefixed("backbone.", encoder), "decode_head.x": torch.zeros(3)}},
    }.get(dialect)  # fmt: skip
    found = {
        "semaim": {n: t for n, t in states["semaim"].items() if not n.startswith("ema.")},
        "semaim tuned": states["tuned"], "semaim probe": states["probe"], "mae": states["mae"],
        "mae tuned": states["tuned"], "timm": states["tuned_cls"], "timm safetensors": states["tuned_cls"],
        "mmpretrain mae": states["mae"],
        "mmpretrain tuned bare": {**encoder, "head.weight": states["tuned_cls"]["head.weight"]},
    }.get(dialect, encoder)  # fmt: skip
    found = {n: t for n, t in states["semaim"].items() if not n.startswith("ema.")} if dialect == "official" else found
    if dialect == "timm safetensors":
        path = folder / "file.safetensors"
        save_file(states["tuned_cls"], path)
    elif dialect == "detectron2 pkl":
        path = folder / "file.pkl"
        arrays = {f"backbone.net.{name}": tensor.numpy() for name, tensor in encoder.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "x"}, protocol=2))
    else:
        torch.save(content, path)
    return path, found


DIALECTS = {
    "semaim": "semaim", "semaim tuned": "semaim", "semaim probe": "semaim", "official": "official SemAIM", "mae": "mae",
    "mae tuned": "mae", "timm": "timm", "timm safetensors": "timm", "dino": "timm", "dino full": "DINO",
    "mmpretrain": "mmpretrain", "mmpretrain mae": "mmpretrain", "mmpretrain tuned bare": "mmpretrain",
    "mmpretrain old": "mmpretrain", "mmpretrain bare": "mmpretrain",
    "detectron2": "detectron2", "detectron2 pkl": "detectron2", "segmentor": "detector or segmentor",
}  # fmt: skip
