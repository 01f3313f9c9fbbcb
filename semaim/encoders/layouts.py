"""Weights files of image encoders that are not in timm's names: recognised, and renamed into them by tables of names.

The files' names come from the code that writes them: transformers 5.24.0 and its names of version 4, open_clip 3.3.0,
facebookresearch/dinov2, dinov3 and ijepa, and apple/ml-aim. timm's `checkpoint_filter_fn` reads some of these layouts
too, but passes over tensors without a word, so every name that is read is in a table here.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm import __version__ as timm_version
from timm.layers import to_2tuple
from timm.models import is_model, model_entrypoint
from torch import Tensor

#: Patterns of the names in a file, and the parts of timm's network that the tensor is divided into.
Rows = tuple[tuple[re.Pattern, list[str]], ...]


@dataclass(frozen=True)
class Foreign:
    """A weights file in another library's names."""

    name: str  #: of the layout, as "transformers DINOv2"
    state: dict[str, Tensor]  #: the image encoder's tensors by timm's names; timm's checkpoint_filter_fn keeps them
    left: list[str]  #: names in the file of what is no part of the image encoder: text tower, mask token, heads
    unread: list[str]  #: names in the file that this layout does not know, or that timm's network has no place for
    arch: str | None = None  #: timm's architecture, if a config determines it
    args: dict[str, Any] = field(default_factory=dict)  #: of `TimmEncoder`'s network, as far as tensors and config tell
    reason: str = ""  #: where arch is None: what is missing


@dataclass(frozen=True)
class Layout:
    """How a library names the tensors of an image encoder; `prefix` stands before all of these names."""

    name: str
    anchor: str  #: a name that each file has
    needs: tuple[str, ...]  #: patterns of further names
    rows: Rows  #: () if the names are timm's already
    archs: tuple[str, str]  #: timm's architecture with a plain and with a gated MLP
    untold: str  #: what the tensors do not tell
    left: str  #: names, or their beginnings, that are no part of the encoder
    types: str = ""  #: model_type in config.json
    eps: float = 1e-6  #: of the architecture's normalisations
    beside: str = ""  #: words of names without the prefix that are no part of it either
    defaults: Mapping[str, Any] = field(default_factory=dict)  #: what config.json need not say
    prefix: str = r"(.*\.)?"  #: pattern
    nested: bool = False  #: the first word of the prefix is the name of a mapping in the file


def rows(text: str) -> Rows:
    """A table from lines of "what the file's names begin with: rest of the name, name in timm's network, ...".

    {n} is the number of a block, and timm's name one within that block; both may go on with .weight or .bias. "a|b"
    is a tensor that timm keeps as equal parts along its first axis, "a[1]" the second part of one that timm keeps as
    one. A part "0", "1" or "rope" is one that timm lacks: it must be 0, 1, or the periods of RoPE to base 100.
    """
    found = []
    for start, pairs in (line.split(":") for line in text.strip().splitlines()):
        block = "blocks.{n}." if "{n}" in start else ""
        for left, right in (pair.split() for pair in pairs.split(",")):
            pattern = re.escape(start.strip() + left).replace(r"\{n\}", r"(?P<n>\d+)") + r"(?P<suffix>\.weight|\.bias)?"
            parts = [part if part in ("0", "1", "rope") else block + part for part in right.split("|")]
            found.append((re.compile(pattern), parts))
    return tuple(found)


#: Names in transformers 4, in which version 5 writes files too, and those in the memory of version 5.
QKV = """attention.attention.query attn.qkv[0], attention.attention.key attn.qkv[1],\
    attention.attention.value attn.qkv[2], attention.output.dense attn.proj"""
QKV_5 = "q_proj attn.qkv[0], k_proj attn.qkv[1], v_proj attn.qkv[2]"
MLP, NORMS = "mlp.fc1 mlp.fc1, mlp.fc2 mlp.fc2", "norm1 norm1, norm2 norm2"
VIT_TOKENS = """
    embeddings.: cls_token cls_token, position_embeddings pos_embed, patch_embeddings.projection patch_embed.proj
    : layernorm norm"""
VIT = rows(f"""{VIT_TOKENS}
    encoder.layer.{{n}}.: {QKV}, intermediate.dense mlp.fc1, output.dense mlp.fc2
    encoder.layer.{{n}}.layernorm_: before norm1, after norm2
    layers.{{n}}.: {MLP}, layernorm_before norm1, layernorm_after norm2
    layers.{{n}}.attention.: {QKV_5}, o_proj attn.proj""")
DINOV2 = rows(f"""{VIT_TOKENS}
    : embeddings.register_tokens reg_token
    encoder.layer.{{n}}.: {QKV}, {NORMS}, {MLP}, layer_scale1.lambda1 ls1.gamma, layer_scale2.lambda1 ls2.gamma
    encoder.layer.{{n}}.attention.: {QKV_5}, o_proj attn.proj
    encoder.layer.{{n}}.mlp.: weights_in mlp.fc1, weights_out mlp.fc2
    encoder.layer.{{n}}.mlp.: gate_proj mlp.fc1[0], up_proj mlp.fc1[1], down_proj mlp.fc2""")
#: In memory, version 5 has "model." before "layer.". An MLP without gate_proj has its fc1 under the name up_proj.
DINOV3 = rows(f"""
    embeddings.: cls_token cls_token, register_tokens reg_token, patch_embeddings patch_embed.proj
    : norm norm
    layer.{{n}}.: {NORMS}, layer_scale1.lambda1 gamma_1, layer_scale2.lambda1 gamma_2, attention.o_proj attn.proj
    layer.{{n}}.attention.: q_proj.bias attn.q_bias, k_proj.bias 0, v_proj.bias attn.v_bias
    layer.{{n}}.attention.: q_proj.weight attn.qkv.weight[0], k_proj.weight attn.qkv.weight[1]
    layer.{{n}}.attention.: v_proj.weight attn.qkv.weight[2]
    layer.{{n}}.mlp.: gate_proj mlp.fc1_g, up_proj mlp.fc1_x, down_proj mlp.fc2""")
#: "pre_layrnorm" is transformers' spelling.
CLIP_ROWS = f"""
    embeddings.: class_embedding cls_token, patch_embedding patch_embed.proj, position_embedding.weight pos_embed
    : pre_layrnorm norm_pre, post_layernorm norm
    encoder.layers.{{n}}.: layer_norm1 norm1, layer_norm2 norm2, {MLP}
    encoder.layers.{{n}}.self_attn.: {QKV_5}, out_proj attn.proj"""
CLIP = rows(CLIP_ROWS)
SIGLIP = rows(f"""{CLIP_ROWS}
    head.: probe attn_pool.latent, attention.out_proj attn_pool.proj, layernorm attn_pool.norm
    head.: mlp.fc1 attn_pool.mlp.fc1, mlp.fc2 attn_pool.mlp.fc2
    head.attention.: in_proj_weight attn_pool.q.weight|attn_pool.kv.weight[0]|attn_pool.kv.weight[1]
    head.attention.: in_proj_bias attn_pool.q.bias|attn_pool.kv.bias[0]|attn_pool.kv.bias[1]""")
OPEN_CLIP = rows("""
    : class_embedding cls_token, conv1.weight patch_embed.proj.weight, positional_embedding pos_embed
    : ln_pre norm_pre, ln_post norm
    transformer.resblocks.{n}.: ln_1 norm1, ln_2 norm2, ls_1.gamma ls1.gamma, ls_2.gamma ls2.gamma
    transformer.resblocks.{n}.: attn.out_proj attn.proj, mlp.c_fc mlp.fc1, mlp.c_proj mlp.fc2
    transformer.resblocks.{n}.attn.: in_proj_weight attn.qkv.weight, in_proj_bias attn.qkv.bias""")
#: What I-JEPA, DINOv2 and DINOv3 name as timm does.
NATIVE = f"""
    : patch_embed.proj patch_embed.proj, norm norm
    blocks.{{n}}.: {NORMS}, attn.proj attn.proj, {MLP}"""
NATIVE_POSITIONS = f"""{NATIVE}
    : pos_embed pos_embed
    blocks.{{n}}.: attn.qkv attn.qkv"""
NATIVE_DINOV2 = rows(f"""{NATIVE_POSITIONS}
    : cls_token cls_token, register_tokens reg_token
    blocks.{{n}}.: ls1.gamma ls1.gamma, ls2.gamma ls2.gamma, mlp.w12 mlp.fc1, mlp.w3 mlp.fc2""")
#: The middle third of a bias is that of the keys. The network multiplies it by a mask, which is 0 there.
NATIVE_DINOV3 = rows(f"""{NATIVE}
    : cls_token cls_token, storage_tokens reg_token, rope_embed.periods rope
    blocks.{{n}}.attn.qkv.: weight attn.qkv.weight, bias attn.q_bias|0|attn.v_bias, bias_mask 1|0|1
    blocks.{{n}}.: ls1.gamma gamma_1, ls2.gamma gamma_2, mlp.w1 mlp.fc1_g, mlp.w2 mlp.fc1_x, mlp.w3 mlp.fc2""")
AIMV2 = rows("""
    preprocessor.: patchifier.proj patch_embed.proj, patchifier.norm.weight patch_embed.norm.weight, pos_embed pos_embed
    : trunk.post_trunk_norm.weight norm.weight
    trunk.blocks.{n}.: norm_1.weight norm1.weight, norm_2.weight norm2.weight
    trunk.blocks.{n}.attn.: qkv.weight attn.qkv.weight, proj.weight attn.proj.weight
    trunk.blocks.{n}.mlp.: fc1 mlp.fc1_g, fc3 mlp.fc1_x, fc2 mlp.fc2""")
TEXT = """embeddings.position_ids text_model text_projection visual_projection logit_scale logit_bias text transformer
    token_embedding ln_final positional_embedding text_decoder attn_mask input_resolution context_length vocab_size"""
HEADS, DINO_HEADS = "pooler classifier decoder embeddings.mask_token", "dino_head ibot_head"
TRAINING = "optimizer opt scheduler lr_scheduler scaler"
UNTOLD = "heads, activation and eps of the normalisations"
#: transformers writes a part of a config, as vision_config, without the values that are the library's defaults.
CLIP_DEFAULTS = {"num_attention_heads": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "image_size": 224}
SIGLIP_DEFAULTS = CLIP_DEFAULTS | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
IJEPA_ARCHS, CLIP_ARCHS = ("vit_huge_patch14_gap_224", ""), ("vit_base_patch16_clip_224", "")
DINOV2_ARCHS = ("vit_base_patch14_dinov2", "vit_giant_patch14_dinov2")
REGISTERS_ARCHS = ("vit_base_patch14_reg4_dinov2", "vit_giant_patch14_reg4_dinov2")
DINOV3_ARCHS = ("vit_base_patch16_dinov3", "vit_small_plus_patch16_dinov3")
PATCHES, PATCHES_VIT = "patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight"
PATCHES_CLIP, PATCHES_AIMV2 = "embeddings.patch_embedding.weight", "preprocessor.patchifier.proj.weight"
#: First match first.
LAYOUTS = (
    Layout("transformers DINOv2 with registers", PATCHES_VIT, (r"embeddings\.register_tokens",), DINOV2,
           REGISTERS_ARCHS, "heads", HEADS, "dinov2_with_registers"),
    Layout("transformers DINOv2", PATCHES_VIT, (r".*layer_scale1\.lambda1",), DINOV2, DINOV2_ARCHS, "heads", HEADS,
           "dinov2"),
    Layout("transformers ViT", PATCHES_VIT, (r"embeddings\.cls_token",), VIT, ("vit_base_patch16_224", ""),
           UNTOLD, HEADS, "vit vit_mae vit_msn"),
    Layout("transformers I-JEPA", PATCHES_VIT, (r"embeddings\.pos.*",), VIT, IJEPA_ARCHS, UNTOLD, HEADS, "ijepa"),
    Layout("transformers DINOv3", "embeddings.patch_embeddings.weight", (r"embeddings\.register_tokens",), DINOV3,
           DINOV3_ARCHS, "heads, activation and the base of RoPE", HEADS, "dinov3_vit", 1e-5),
    Layout("transformers CLIP", PATCHES_CLIP, (r"embeddings\.class_embedding",), CLIP, CLIP_ARCHS,
           UNTOLD, TEXT, "clip clip_vision_model", 1e-5, defaults=CLIP_DEFAULTS),
    Layout("transformers SigLIP", PATCHES_CLIP, (r"embeddings\.position_embedding\.weight",), SIGLIP,
           ("vit_base_patch16_siglip_224", ""), UNTOLD, TEXT, "siglip siglip_vision_model", defaults=SIGLIP_DEFAULTS),
    Layout("OpenCLIP", "conv1.weight", (r"class_embedding", r"transformer\.resblocks\.0\.ln_1\.weight"), OPEN_CLIP,
           CLIP_ARCHS, "heads and activation (GELU or QuickGELU)", "proj", eps=1e-5, beside=TEXT),
    Layout("OpenCLIP with timm's tower", PATCHES, (r"blocks\.0\.norm1\.weight",), (), ("", ""), "timm's architecture",
           "head", beside=TEXT, prefix=r"(.*\.)?trunk\."),
    Layout("native AIMv2", PATCHES_AIMV2, (r"trunk\.blocks\.0\.norm_1\.weight",), AIMV2,
           ("", "aimv2_large_patch14_224"), "heads", "head", "aimv2", 1e-5,
           beside="text_encoder image_projector text_projector log_logit_scale"),
    Layout("native DINOv3", PATCHES, (r"storage_tokens|rope_embed\.periods",), NATIVE_DINOV3, DINOV3_ARCHS,
           "heads and eps of the normalisations", "mask_token local_cls_norm", beside=DINO_HEADS),
    Layout("native DINOv2", PATCHES, (r"mask_token|register_tokens|blocks\.(\d+\.)?0\.mlp\.w12\.weight",
                                      r"blocks\.(\d+\.)?0\.ls1\.gamma"),
           NATIVE_DINOV2, DINOV2_ARCHS, "heads", "mask_token", beside=DINO_HEADS),
    Layout("native I-JEPA", PATCHES, (r"blocks\.0\.norm1\.weight",), rows(NATIVE_POSITIONS), IJEPA_ARCHS,
           "heads", "", beside="predictor", prefix=r"(target_)?encoder\.(module\.)?", nested=True),
)  # fmt: skip
#: transformers' names of activations, and timm's.
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu"}
ACTIVATIONS |= {"silu": "silu", "swish": "silu", "relu": "relu"}
#: What vision_cfg of open_clip_config.json may say: sizes, training, and what the tensors tell.
OPEN_CLIP_KEYS = """layers width head_width mlp_ratio patch_size image_size patch_dropout output_tokens pool_type
    pos_embed_type ls_init_value final_ln_after_pool""".split()
SIZES = {"hidden_size": "embed_dim", "num_hidden_layers": "depth", "width": "embed_dim", "layers": "depth"}
SIZES |= {"patch_size": "patch_size", "num_channels": "in_chans"}
#: Where a file has several encoders, the one that its authors evaluate: the average of the trained one.
AVERAGES = {"target_encoder", "teacher"}
#: Of how many parts a tensor of timm's is joined.
JOINED = {"qkv": 3, "kv": 2, "fc1": 2}
TOKENS = ("cls_token", "reg_token", "pos_embed", "attn_pool.latent")


def flatten(content: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested mappings and lists, by the names on the way to them, joined by dots."""
    if isinstance(content, Tensor):
        yield place, content
    elif isinstance(content, (Mapping, list, tuple)):
        for key, value in content.items() if isinstance(content, Mapping) else enumerate(content):
            yield from flatten(value, f"{place}.{key}" if place else str(key))


def recognise(content: Mapping, config: Mapping | None = None) -> Foreign | None:
    """The image encoder in a file of another library; None if the file has none of these layouts.

    Args:
        content: what the file holds: tensors by name, or nested mappings of them.
        config: the config.json or open_clip_config.json beside the file.
    """
    tensors = dict(flatten(content))
    for layout in LAYOUTS:
        if prefixes := find(layout, tensors, content):
            break
    else:
        return None
    best = [p for p in prefixes if AVERAGES & set(p.split("."))] if len(prefixes) > 1 else prefixes
    if len(best) != 1:
        reason = f"the file has several encoders, {', '.join(map(repr, prefixes))}: keep the names of one"
        return Foreign(layout.name, {}, [], list(tensors), reason=reason)
    state, left, unread = rename(layout, tensors, best[0], prefixes)
    arch, args, reason = architecture(layout, state, config)
    return Foreign(layout.name, state, left, unread, None if reason else arch, args, reason)


def find(layout: Layout, tensors: Mapping[str, Tensor], content: Mapping) -> list[str]:
    """The prefixes under which a file has the names of a layout."""
    found = []
    for prefix in (name.removesuffix(layout.anchor) for name in tensors if name.endswith(layout.anchor)):
        needs = [re.compile(f"{re.escape(prefix)}({need})") for need in layout.needs]
        place = not layout.nested or isinstance(content.get(prefix.split(".")[0]), Mapping)
        if place and re.fullmatch(layout.prefix, prefix) and all(any(map(n.fullmatch, tensors)) for n in needs):
            found.append(prefix)
    return found


def divided(table: Rows, name: str, tensor: Tensor, mask: Tensor | None) -> list[tuple[str, int, Tensor]] | None:
    """The parts of a tensor: names in timm's network, places in a joined tensor or -1, values; None if unknown."""
    if not table:
        return [(name, -1, tensor)]
    # DINOv2's training groups blocks in chunks, with their numbers in the whole network: blocks.1.7. is block 7.
    name = re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", re.sub(r"^model\.(layer\.)", r"\1", name))
    match, targets = next(((m, targets) for row, targets in table if (m := row.fullmatch(name))), (None, []))
    count = len(targets)
    if not match or tensor.ndim == 0 or len(tensor) % count:
        return None
    values = tensor.chunk(count) if count > 1 else (tensor,)
    masks = mask.chunk(count) if mask is not None and mask.shape == tensor.shape else (None,) * count
    found, parts = match.groupdict(), []
    for target, value, switch in zip(targets, values, masks, strict=True):
        if target in ("0", "1", "rope"):
            wanted = 100 ** (torch.arange(len(value)) / len(value)) if target == "rope" else torch.tensor(float(target))
            off = target == "0" and switch is not None and not switch.any()
            if not off and not torch.allclose(value.float(), wanted, rtol=0.01, atol=0):  # the periods are in bfloat16
                return None
        else:
            target, _, place = target.replace("{n}", found.get("n") or "").rstrip("]").partition("[")
            parts.append((target + (found["suffix"] or ""), int(place or -1), value))
    return parts


def rename(layout: Layout, tensors: Mapping[str, Tensor], prefix: str, prefixes: list[str]) -> tuple[dict, list, list]:
    """The encoder's tensors by timm's names, and the names of those that are no part of it, and of unknown ones."""
    state: dict[str, Tensor] = {}
    left, unread = list[str](), list[str]()
    joined: dict[str, dict[int, tuple[str, Tensor]]] = {}
    others = tuple(other for other in prefixes if other != prefix)
    beside = {*layout.beside.split(), *layout.left.split(), *TRAINING.split()}
    for name, tensor in tensors.items():
        own = name.removeprefix(prefix)
        if not name.startswith(prefix):
            (left if name.startswith(others) or beside & set(name.split(".")) else unread).append(name)
        elif any(own == word or own.startswith(f"{word}.") for word in layout.left.split()):
            left.append(name)
        else:
            known = divided(layout.rows, own, tensor, tensors.get(f"{name}_mask"))
            if known is None or any(joined.get(target, {}).keys() & {place} for target, place, _ in known):
                unread.append(name)
            elif not known:
                left.append(name)
            for target, place, value in known or () if name not in unread[-1:] else ():
                joined.setdefault(target, {})[place] = (name, value)
    for target, found in joined.items():
        values = [found[place][1] for place in sorted(found)]
        stem = target.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        whole = [*found] == [-1] or sorted(found) == [*range(JOINED.get(stem, 0))]
        flat = target == PATCHES and values[0].ndim != 4  # as in SigLIP 2 for images of any shape
        if whole and not flat and len({value.shape[1:] for value in values}) == 1:
            value = torch.cat(values) if len(values) > 1 else values[0]
            state[target] = value.reshape(1, -1, value.shape[-1]) if target in TOKENS and value.ndim < 3 else value
        else:
            unread += [name for name, _ in found.values() if name not in unread]
    if layout.rows is DINOV3 and not any(".fc1_g." in name for name in state):
        state = {name.replace(".fc1_x.", ".fc1."): value for name, value in state.items()}
    if layout.rows in (DINOV2, NATIVE_DINOV2) and {"cls_token", "reg_token", "pos_embed"} <= state.keys():
        # DINOv2 adds positions to the class token and the patches before it inserts the registers; timm's network
        # with registers adds them to the patches alone.
        state["cls_token"] = state["cls_token"].float() + state["pos_embed"][:, :1].float()
        state["pos_embed"] = state["pos_embed"][:, 1:]
    return state, left, unread


def measured(layout: Layout, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of timm's network that the shapes of its tensors tell; {} if it lacks patches or a first block."""
    patches, fc2 = state.get(PATCHES), state.get("blocks.0.mlp.fc2.weight")
    hidden = state.get("blocks.0.mlp.fc1_g.weight", state.get("blocks.0.mlp.fc1.weight"))
    if patches is None or hidden is None or fc2 is None or (hidden.ndim, fc2.ndim) != (2, 2):
        return {}
    width, channels, *patch = patches.shape
    args: dict[str, Any] = {"patch_size": patch[0] if patch[0] == patch[1] else tuple(patch), "embed_dim": width}
    args |= {"in_chans": channels, "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")})}
    ratio = len(hidden) / width  # timm rounds width * ratio down
    args["mlp_ratio"] = ratio if int(width * ratio) == len(hidden) else ratio + 0.5 / width
    eva = layout.archs is DINOV3_ARCHS
    args["qkv_bias"] = f"blocks.0.attn.{'q_bias' if eva else 'qkv.bias'}" in state
    if "reg_token" in state:
        args["num_reg_tokens" if eva else "reg_tokens"] = state["reg_token"].shape[1]
    if layout.name == "OpenCLIP" and "blocks.0.ls1.gamma" in state:
        args["init_values"] = 1e-5  # only that there is one matters: the file's tensors replace it
    if eva and "blocks.0.mlp.fc1_g.weight" in state:
        args["swiglu_align_to"] = 1  # the gate as a tensor of its own, and a hidden width of any number
    if layout.name == "transformers SigLIP" and "attn_pool.latent" not in state:
        args |= {"global_pool": "avg", "fc_norm": False}
    return args


def architecture(layout: Layout, state: Mapping[str, Tensor], config: Mapping | None) -> tuple[str, dict, str]:
    """timm's architecture, its arguments, and why it is not certain, or ""."""
    args = measured(layout, state) if layout.rows else {}
    if layout.rows and not args:
        return "", {}, "the file has no patch projection or no first block"
    if config is None:
        return "", args, f"the tensors do not tell {layout.untold}: give --arch"
    reader = by_open_clip if layout.name.startswith("OpenCLIP") else by_transformers
    arch, more, problems = reader(layout, state, config, args)
    args |= {key: tuple(n) if isinstance(n, list) else n for key, n in more.items() if n is not None}
    problems += [f"the config does not determine {name}" for name, value in more.items() if value is None]
    if "pos_embed" in state and not problems and layout.rows:
        (height, width), (down, across) = to_2tuple(args["img_size"]), to_2tuple(args["patch_size"])
        tokens = state["pos_embed"].shape[1] - ("cls_token" in state and "reg_token" not in state)
        if (height // down) * (width // across) != tokens:
            problems = [f"the config's images of {height} x {width} pixels have not the file's {tokens} positions"]
    return arch, args, f"{'; '.join(problems)}: give --arch" if problems else ""


def differing(args: Mapping[str, Any], said: Mapping[str, Any]) -> list[str]:
    """In which sizes a config and the tensors differ."""
    said = {ours: said[name] for name, ours in SIZES.items() if name in said}
    wrong = [ours for ours, value in said.items() if to_2tuple(value) != to_2tuple(args[ours])]
    return [f"the config says {ours} {said[ours]}, and the tensors {args[ours]}" for ours in wrong]


def by_transformers(layout: Layout, state: Mapping, config: Mapping, args: Mapping) -> tuple[str, dict, list[str]]:
    """Architecture, further arguments and problems, by transformers' config.json, or AIMv2's."""
    said = {**layout.defaults, **config.get("vision_config", config)}
    kind = said.get("model_type", config.get("model_type"))
    if kind not in layout.types.split():
        return "", {}, [f"the config is of model_type {kind!r}, and the tensors of {layout.name}"]
    fc1 = state.get("blocks.0.mlp.fc1.weight")
    gated = fc1 is None or len(fc1) != state["blocks.0.mlp.fc2.weight"].shape[1]
    more = {"num_heads": said.get("num_attention_heads"), "img_size": said.get("image_size")}
    problems = differing(args, said)
    activation = ACTIVATIONS.get(said.get("hidden_act", ""))
    if layout.archs is DINOV3_ARCHS:
        more["rope_temperature"] = said.get("rope_theta")
        if activation != ("silu" if gated else "gelu"):  # those of timm's eva, which takes no other
            problems.append(f"timm's DINOv3 has no MLP with {said.get('hidden_act')}")
    elif not gated:  # the gate of DINOv2 and AIMv2 is SiLU whatever the config says
        more["act_layer"] = activation
    eps = said.get("rms_norm_eps", said.get("layer_norm_eps"))
    if eps != layout.eps:  # transformers' ViT has 1e-12
        more["norm_eps"] = eps if isinstance(eps, float) and 0 < eps < 0.01 else None
    return layout.archs[gated], more, problems if layout.archs[gated] else [f"timm has no {layout.name} with such MLPs"]


def by_open_clip(layout: Layout, state: Mapping, config: Mapping, args: Mapping) -> tuple[str, dict, list[str]]:
    """Architecture, further arguments and problems, by open_clip_config.json."""
    model = config.get("model_cfg", config)
    said = model.get("vision_cfg", {})
    arch = said.get("timm_model_name", "")
    if not layout.rows:
        pool, module = said.get("timm_pool", "avg"), model_entrypoint(arch).__module__ if is_model(arch) else ""
        kind = module.rpartition(".")[2]
        if kind not in ("vision_transformer", "eva") or pool not in ("", "avg", "token", "map"):
            return "", {}, [f"the config's {arch!r} with pooling {pool!r} is no plain ViT of timm {timm_version}"]
        # open_clip sets the pooling after timm has built the network, and so keeps the place of the norm.
        norm = {"fc_norm" if kind == "vision_transformer" else "use_fc_norm": "fc_norm.weight" in state}
        return arch, norm | ({"global_pool": pool} if pool else {}), []
    problems = [f"timm lacks {key}" for key, value in said.items() if value and key not in OPEN_CLIP_KEYS]
    problems += differing(args, said)
    pool = said.get("pool_type", "tok")
    if arch or "width" not in said or pool not in ("tok", "avg") or (pool == "avg" and said.get("final_ln_after_pool")):
        problems.append("the config is not that of OpenCLIP's ViT whose norm comes before the pooling")
    more = {"num_heads": args["embed_dim"] // said.get("head_width", 64), "img_size": said.get("image_size", 224)}
    more["act_layer"] = "quick_gelu" if model.get("quick_gelu") else "gelu"
    return layout.archs[0], more | ({"global_pool": "avg", "fc_norm": False} if pool == "avg" else {}), problems
