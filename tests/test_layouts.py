"""Weights of other libraries' image encoders: recognised, renamed, and the same outputs in timm's network."""

import json
import re

import pytest
import timm
import torch
from timm.models import eva, vision_transformer
from torch import Tensor, nn

from semaim.encoders.layouts import LAYOUTS, Foreign, flatten, recognise
from semaim.encoders.timm_vit import TimmEncoder

pytestmark = pytest.mark.slow  # many small tests, together most of a minute
SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
TESTS = "is not installed: runs after tools/setup.sh"


def randomised(network: nn.Module) -> nn.Module:
    """The network with every parameter away from its initial value, those of norms around 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            mean = 1.0 if parameter.ndim == 1 and bool((parameter == 1).all()) else 0.0
            parameter.copy_(mean + 0.2 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def images(height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def network(found: Foreign) -> nn.Module:
    """timm's network as a file with a config determines it, with the file's tensors."""
    assert (found.unread, found.reason) == ([], "") and found.arch
    args = {name: value for name, value in found.args.items() if name not in ("img_size", "patch_size")}
    encoder = TimmEncoder(found.arch, args, found.args.get("img_size"), found.args.get("patch_size"))
    assert same(encoder.filtered(found.state), found.state)
    encoder.vit.load_state_dict(found.state, strict=True)
    return encoder.vit.eval()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def replaced(name: str, pairs: dict[str, str]) -> str:
    for ours, theirs in pairs.items():
        name = name.replace(ours, theirs)
    return name


def close(ours: Tensor, theirs: Tensor) -> None:
    difference = (ours - theirs).detach().abs()
    print(f"largest difference {difference.max():.1e} of {theirs.detach().abs().max():.1f}")
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def nest(content: dict, new: dict[str, Tensor]) -> dict:
    """Tensors by joined names, nested as a content is."""
    if all(isinstance(value, Tensor) for value in content.values()):
        return new
    split = [(*name.split(".", 1), value) for name, value in new.items()]
    return {key: {rest: value for start, rest, value in split if start == key} for key in content}


def check_nothing_lost(content: dict) -> Foreign:
    """Each tensor is in the state, left or unread; a changed one changes the state; a renamed or new one is noticed."""
    tensors = dict(flatten(content))
    found = recognise(content)
    assert found and found.unread == [] and found.arch is None and found.reason
    assert len(set(found.left)) == len(found.left) and set(found.left) <= tensors.keys()

    def again(new: dict[str, Tensor]) -> Foreign | None:
        return recognise(nest(content, new))

    for name in set(found.left):  # DINOv2's names are timm's without the mask token
        less = again({key: value for key, value in tensors.items() if key != name})
        assert less.state.keys() == found.state.keys() if less else name.endswith("mask_token")
    for name in tensors.keys() - set(found.left):
        changed = again(tensors | {name: tensors[name] + 1.5})
        kept = changed.state if changed else {}
        assert any(not torch.equal(value, kept.get(key, value + 1)) for key, value in found.state.items()), name
        other = again({f"{key}_new" if key == name else key: value for key, value in tensors.items()})
        # Without the tensor that was renamed, timm's network cannot be loaded strictly.
        assert other is None or f"{name}_new" in other.unread or other.state.keys() - found.state.keys(), name
    more = again(tensors | {f"{name}.strange": torch.ones(2)})
    assert f"{name}.strange" in more.unread or more.state.keys() - found.state.keys()
    return found


def written(network: nn.Module, folder) -> tuple[dict, dict]:
    """The tensors and the config of what transformers writes."""
    from safetensors.torch import load_file

    network.save_pretrained(folder)
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


TRANSFORMERS = {
    "ViTModel": ("vit", {"intermediate_size": 100, "hidden_act": "gelu_new"}),
    "ViTForImageClassification": ("vit", {"intermediate_size": 96, "layer_norm_eps": 1e-6, "qkv_bias": False}),
    "ViTMSNModel": ("vit_msn", {"intermediate_size": 96, "layer_norm_eps": 1e-6}),
    "ViTMAEModel": ("vit_mae", {"intermediate_size": 96, "layer_norm_eps": 1e-6, "mask_ratio": 0.0}),
    "IJepaModel": ("ijepa", {"intermediate_size": 96, "layer_norm_eps": 1e-6}),
    "Dinov2Model": ("dinov2", {}),
    "Dinov2ForImageClassification": ("dinov2", {"use_swiglu_ffn": True}),
    "Dinov2WithRegistersModel": ("dinov2_with_registers", {"num_register_tokens": 3}),
    "Dinov2WithRegistersForImageClassification": ("dinov2_with_registers", {"use_swiglu_ffn": True}),
    "DINOv3ViTModel": ("dinov3_vit", {"intermediate_size": 96, "num_register_tokens": 2}),
    "DINOv3ViTModel gated": ("dinov3_vit", {"intermediate_size": 100, "use_gated_mlp": True, "hidden_act": "silu",
                                            "num_register_tokens": 4}),
    "DINOv3ViTModel without biases": ("dinov3_vit", {"intermediate_size": 96, "query_bias": False, "value_bias": False,
                                                     "num_register_tokens": 1, "rope_theta": 50.0}),
    "SiglipVisionModel": ("siglip_vision_model", {"intermediate_size": 100}),
    "SiglipVisionModel without head": ("siglip_vision_model", {"intermediate_size": 96, "vision_use_head": False}),
    "CLIPVisionModel": ("clip_vision_model", {"intermediate_size": 96}),
    "CLIPVisionModelWithProjection": ("clip_vision_model", {"intermediate_size": 96, "hidden_act": "gelu"}),
}  # fmt: skip


def transformers_network(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason=f"transformers {TESTS}")
    kind, values = TRANSFORMERS[name]
    config = transformers.AutoConfig.for_model(kind, **SMALL, **values)
    return randomised(getattr(transformers, name.split()[0])(config))


@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.no_grad()
def test_transformers(name, tmp_path):
    theirs = transformers_network(name)
    saved, config = written(theirs, tmp_path)
    base = theirs.base_model if hasattr(theirs, "classifier") else theirs
    order = {"noise": torch.arange(16.0).expand(2, -1)} if "MAE" in name else {}  # the patches in their order
    for tensors in (saved, dict(theirs.state_dict())):
        found = recognise(tensors, config)
        assert found.name.split()[1].lower().replace("-", "") in name.lower()
        built = network(found)
        for size in [(32, 32), (24, 48)] if "DINOv3" in name else [(32, 32)]:
            wanted = base(images(*size), **order)
            tokens = built.forward_features(images(*size))
            pooled = built.forward_head(tokens, pre_logits=True)
            if "CLIP" not in name:
                close(tokens, wanted.last_hidden_state)
            else:  # transformers normalises the class token alone
                close(tokens, getattr(theirs, "vision_model", theirs).post_layernorm(wanted.last_hidden_state))
            if hasattr(theirs, "visual_projection"):
                close(theirs.visual_projection(pooled), wanted.image_embeds)
            elif name in ("CLIPVisionModel", "SiglipVisionModel"):
                close(pooled, wanted.pooler_output)
        assert all(re.search("mask_token|classifier|pooler|visual_projection", own) for own in found.left)
        check_nothing_lost(tensors)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@torch.no_grad()
def test_both_towers_of_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers", reason=f"transformers {TESTS}")
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**SMALL, "num_attention_heads": 12, "intermediate_size": 96, "image_size": 224, "patch_size": 56}
    config = transformers.AutoConfig.for_model(kind, text_config=text, vision_config=vision)
    theirs = randomised(transformers.AutoModel.from_config(config))
    tensors, read = written(theirs, tmp_path)
    # Version 4 wrote this part of a config without the values that are the library's defaults: heads, activation, eps.
    read["vision_config"] = {key: vision[key] for key in ("hidden_size", "num_hidden_layers", "patch_size")}
    found, pixels = recognise(tensors, read), images(224, 224)
    built = network(found)
    assert all(name.startswith(("text", "logit", "visual_projection")) for name in found.left)
    wanted = theirs.vision_model(pixels)
    norm = theirs.vision_model.post_layernorm if kind == "clip" else nn.Identity()
    close(built.forward_features(pixels), norm(wanted.last_hidden_state))
    close(built(pixels), wanted.pooler_output)
    check_nothing_lost(tensors)


def test_defaults_are_those_of_transformers():
    transformers = pytest.importorskip("transformers", reason=f"transformers {TESTS}")
    for layout in LAYOUTS:
        for kind in layout.types.split() if layout.defaults else ():
            config = transformers.AutoConfig.for_model(kind)
            config = getattr(config, "vision_config", config)
            assert {name: getattr(config, name) for name in layout.defaults} == layout.defaults


def test_eps_are_those_of_timm():
    for layout in LAYOUTS:
        for arch in layout.archs if layout.types else ():
            if arch:
                built = timm.create_model(arch, embed_dim=48, depth=1, num_heads=4, num_classes=0)
                assert {module.eps for module in built.modules() if hasattr(module, "eps")} == {layout.eps}, arch


OPEN_CLIP = {"layers": 2, "width": 48, "head_width": 12, "patch_size": 8, "image_size": 32}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("vision", [{}, {"mlp_ratio": 2.1, "ls_init_value": 0.1, "pool_type": "avg"}])
@torch.no_grad()
def test_open_clip(vision, quick_gelu):
    open_clip = pytest.importorskip("open_clip", reason=f"open_clip {TESTS}")
    model = {"embed_dim": 40, "vision_cfg": {**OPEN_CLIP, **vision}, "text_cfg": TEXT, "quick_gelu": quick_gelu}
    theirs = randomised(open_clip.CLIP(**model))
    config, tower = {"model_cfg": model, "preprocess_cfg": {}}, theirs.visual
    tower.output_tokens = True
    for tensors in (theirs.state_dict(), tower.state_dict()):
        built = network(found := recognise(tensors, config))
        assert built.blocks[0].attn.num_heads == 4
        pooled, patches = tower(images())
        tokens = built.forward_features(images())
        close(tokens[:, 1:], patches)
        close(built.forward_head(tokens, pre_logits=True) @ tower.proj, pooled)
        check_nothing_lost(dict(tensors))
        wrapped = {f"module.{name}": tensor for name, tensor in tensors.items()}
        assert recognise({"state_dict": wrapped}, config).state.keys() == found.state.keys()
    assert "transformer.resblocks.0.ln_1.weight" in recognise(theirs.state_dict()).left


TIMM_TOWERS = {
    "vit_base_patch16_siglip_224": {"timm_pool": "map", "timm_proj": "none"},
    "vit_base_patch16_clip_224": {},
    "eva02_tiny_patch14_224": {"timm_pool": "token", "timm_proj": "linear"},
    "vit_base_patch16_224": {"timm_pool": "avg", "timm_proj": ""},
    "vit_base_patch14_reg4_dinov2": {"timm_pool": "token"},
}


@pytest.mark.parametrize(("arch", "vision"), TIMM_TOWERS.items())
@torch.no_grad()
def test_open_clip_with_timm(arch, vision, monkeypatch):
    open_clip = pytest.importorskip("open_clip", reason=f"open_clip {TESTS}")
    made, small = timm.create_model, {"embed_dim": 48, "depth": 2, "num_heads": 4}
    monkeypatch.setattr(timm, "create_model", lambda name, **args: made(name, **{**args, **small}))
    model = {"embed_dim": 40, "vision_cfg": {"timm_model_name": arch, "image_size": 224, **vision}, "text_cfg": TEXT}
    theirs = randomised(open_clip.CLIP(**model))
    tower, pixels = theirs.visual, images(*theirs.visual.trunk.patch_embed.img_size)
    for tensors in (theirs.state_dict(), tower.state_dict()):
        built = network(found := recognise(tensors, {"model_cfg": model}))
        assert found.arch == arch
        tokens = built.forward_features(pixels)
        close(tokens, tower.trunk.forward_features(pixels))
        head = tower.trunk.head if vision.get("timm_proj") == "" else tower.head
        close(head(built.forward_head(tokens, pre_logits=True)), tower(pixels))
        check_nothing_lost(dict(tensors))
    assert recognise(tensors, {"model_cfg": {"vision_cfg": {"timm_model_name": "convnext_tiny"}}}).arch is None


def timm_network(arch: str, **args) -> nn.Module:
    return randomised(timm.create_model(arch, num_classes=0, embed_dim=48, depth=2, num_heads=4, **args))


def native_dinov2(state: dict[str, Tensor], chunk: bool) -> dict[str, Tensor]:
    """facebookresearch/dinov2's names: dinov2/models/vision_transformer.py, layers/swiglu_ffn.py."""
    gated = len(state["blocks.0.mlp.fc1.weight"]) > 48 * 4
    names = {"mlp.fc1": "mlp.w12", "mlp.fc2": "mlp.w3"} if gated else {}
    native = {replaced(name, names): tensor for name, tensor in state.items()} | {"mask_token": torch.randn(1, 48)}
    if chunk:
        native = {re.sub(r"blocks\.(\d+)", r"blocks.\1.\1", name): tensor for name, tensor in native.items()}
    if "reg_token" in state:
        native["register_tokens"] = native.pop("reg_token")
        place = torch.randn(1, 1, 48)
        native["cls_token"] = native["cls_token"] - place
        native["pos_embed"] = torch.cat([place, native["pos_embed"]], dim=1)
    return native


@pytest.mark.parametrize("arch", [arch for layout in LAYOUTS if "DINOv2" in layout.name for arch in layout.archs][:4])
def test_native_dinov2(arch):
    built = timm_network(arch, img_size=28, patch_size=14)
    state = built.state_dict()
    plain = native_dinov2(state, chunk=False)
    filtered = vision_transformer.checkpoint_filter_fn(dict(plain), built)
    for native in (plain, native_dinov2(state, chunk=True)):
        teacher = {"teacher": {f"backbone.{name}": tensor for name, tensor in native.items()}}
        teacher["teacher"]["dino_head.mlp.0.weight"] = torch.ones(1)
        for content in (native, teacher):
            found = check_nothing_lost(content)
            assert "DINOv2" in found.name and found.args["embed_dim"] == 48 and found.args["depth"] == 2
            built.load_state_dict(found.state, strict=True)
            torch.testing.assert_close(found.state, dict(state))
            if native is plain:
                torch.testing.assert_close(found.state, filtered)
    assert recognise(dict(state)) is None


def native_dinov3(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """facebookresearch/dinov3's names: dinov3/models/vision_transformer.py, layers/{attention,ffn_layers}.py."""
    native = {"mask_token": torch.randn(1, 48), "rope_embed.periods": (100 ** (torch.arange(3) / 3)).bfloat16()}
    names = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    if any("fc1_g" in name for name in state):
        names |= {"mlp.fc1_g": "mlp.w1", "mlp.fc1_x": "mlp.w2", "mlp.fc2": "mlp.w3"}
    for name, tensor in state.items():
        name = replaced(name, names)
        if name.endswith("q_bias"):
            value = state[name.replace("q_bias", "v_bias")]
            native[name.replace("q_bias", "qkv.bias")] = torch.cat([tensor, torch.zeros(48), value])
            native[name.replace("q_bias", "qkv.bias_mask")] = torch.ones(144).index_fill(0, torch.arange(48, 96), 0)
        elif not name.endswith("v_bias"):
            native[name] = tensor
    return native


@pytest.mark.parametrize("arch", ["base_patch16_dinov3", "base_patch16_dinov3_qkvb", "small_plus_patch16_dinov3"])
def test_native_dinov3(arch):
    state = (built := timm_network(f"vit_{arch}")).state_dict()
    native = native_dinov3(state)
    found = check_nothing_lost(native)
    assert found.name == "native DINOv3" and {"mask_token", "rope_embed.periods"} <= set(found.left)
    assert same(found.state, state) and same(eva.checkpoint_filter_fn(dict(native), built), found.state)
    assert found.args.get("qkv_bias") == ("qkvb" in arch)
    if found.args["qkv_bias"]:
        bias, mask = "blocks.1.attn.qkv.bias", "blocks.1.attn.qkv.bias_mask"
        masked, query = recognise(native | {bias: native[bias] + 1}), "blocks.1.attn.q_bias"
        assert masked.unread == [] and torch.equal(masked.state[query], state[query] + 1)
        assert recognise({k: v for k, v in native.items() if k != mask} | {bias: native[bias] + 1}).unread == [bias]
        assert recognise(native | {mask: torch.ones(144)}).unread == [mask]
    assert recognise(native | {"rope_embed.periods": torch.ones(3)}).unread == ["rope_embed.periods"]
    assert recognise(native | {"cls_norm.weight": torch.ones(48)}).unread == ["cls_norm.weight"]


@pytest.mark.parametrize("wrapped", ["module.", ""])
def test_native_ijepa(wrapped):
    """facebookresearch/ijepa: src/train.py saves dictionaries of encoder, predictor and target_encoder."""
    built = timm_network("vit_huge_patch14_gap_224", img_size=28)
    state = built.state_dict()
    target = {f"{wrapped}{name}": tensor for name, tensor in state.items()}
    online = {name: tensor + 1 for name, tensor in target.items()}
    predictor = {f"{wrapped}predictor_embed.weight": torch.ones(2, 2)}
    whole = {"encoder": online, "predictor": predictor, "target_encoder": target}
    for content in (whole, {"target_encoder": target}, {"encoder": target, "predictor": predictor}):
        found = check_nothing_lost(content)
        assert found.name == "native I-JEPA" and same(found.state, state)
    wrapped_state = {f"module.{name}": tensor for name, tensor in state.items()}
    assert same(vision_transformer.checkpoint_filter_fn({"encoder": wrapped_state}, built), found.state)
    assert "opt.state.0.m" in recognise({**whole, "opt": {"state": {0: {"m": torch.ones(2)}}}, "epoch": 3}).left


def test_native_aimv2():
    """apple/ml-aim: aim-v2/aim/v2/torch/models.py, layers.py, and aim-v1/aim/v1/torch/layers.py."""
    built = timm_network("aimv2_large_patch14_224", img_size=28, mlp_ratio=2.1)
    state = built.state_dict()
    names = {"patch_embed": "preprocessor.patchifier", "pos_embed": "preprocessor.pos_embed", "blocks": "trunk.blocks"}
    names |= {"fc1_g": "fc1", "fc1_x": "fc3", "norm1": "norm_1", "norm2": "norm_2"}
    native = {replaced(name, names): tensor for name, tensor in state.items()}
    native["trunk.post_trunk_norm.weight"] = native.pop("norm.weight")
    found = check_nothing_lost(native)
    assert same(found.state, state)
    assert same(vision_transformer.checkpoint_filter_fn(dict(native), built), found.state)
    config = {"model_type": "aimv2", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"patch_size": 14, "image_size": 28, "rms_norm_eps": 1e-5, "intermediate_size": 100}
    other = network(recognise(native, config))
    close(other(images(28, 28)), built(images(28, 28)))
    assert recognise(native, config | {"rms_norm_eps": 1e-6}).args["norm_eps"] == 1e-6


def test_other_files_are_none():
    for arch in ("vit_base_patch16", "vit_base_patch16_siglip", "vit_base_patch16_clip", "beit_base_patch16"):
        state = timm_network(f"{arch}_224", img_size=32).state_dict()
        for content in (state, {"model": state}, {"state_dict": {f"module.{k}": v for k, v in state.items()}}):
            assert recognise(content) is None
    mae = {"mask_token": torch.ones(1, 1, 8), "patch_embed.proj.weight": torch.ones(8, 3, 2, 2)}
    mae |= {"blocks.0.norm1.weight": torch.ones(8), "decoder_embed.weight": torch.ones(4, 8)}
    assert recognise({"model": mae, "epoch": 1}) is None
    simmim = {f"encoder.{name}": tensor for name, tensor in mae.items()}
    assert all(recognise(content) is None for content in ({"model": simmim}, simmim, {}, {"model": 3}))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layer_norm_eps": None}, "does not determine norm_eps"),
        ({"hidden_act": "mish"}, "does not determine act_layer"),
        ({"num_attention_heads": None}, "does not determine num_heads"),
        ({"image_size": 24}, "24 x 24 pixels have not the file's 16 positions"),
        ({"model_type": "dinov3_vit"}, "model_type 'dinov3_vit'"),
        ({"hidden_size": 384}, "embed_dim 384, and the tensors 48"),
    ],
)
def test_a_config_that_does_not_determine_timms_network(change, reason, tmp_path):
    tensors, config = written(transformers_network("Dinov2Model"), tmp_path)
    assert recognise(tensors, config).arch == "vit_base_patch14_dinov2"
    refused = recognise(tensors, {**config, **change})
    assert refused.arch is None and reason in refused.reason


def test_unknown_parts_are_unread():
    q = {"layer.0.attention.q_proj.weight": torch.ones(8, 8), "layer.0.attention.k_proj.bias": torch.ones(8)}
    patches = {"embeddings.patch_embeddings.weight": torch.ones(8, 3, 2, 2)}
    tensors = patches | {"embeddings.register_tokens": torch.ones(1, 1, 8)}
    assert set(recognise(tensors | q).unread) == set(q)  # a third of a tensor, and a bias of keys
    zero = recognise(tensors | {"layer.0.attention.k_proj.bias": torch.zeros(8)})
    assert zero.unread == [] and zero.left == ["layer.0.attention.k_proj.bias"]
    # SigLIP 2 for images of any shape has a matrix for its patches.
    patches = {"embeddings.patch_embedding.weight": torch.ones(8, 12)}
    assert recognise(patches | {"embeddings.position_embedding.weight": torch.ones(4, 8)}).unread == list(patches)
    two = {f"{tower}.{name}": tensor for tower in "ab" for name, tensor in tensors.items()}
    found = recognise(two)
    assert found.state == {} and set(found.unread) == two.keys() and "several encoders" in found.reason
