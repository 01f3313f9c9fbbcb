"""Sources of encoders: names of timm and the hub, folders, files; only whole files; images prepared as by timm."""

import json
import re
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from encoder_files import images_of, narrow, random_state, reference, state_of
from huggingface_hub.errors import LocalEntryNotFoundError
from mmengine.config import Config
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config

from semaim.checkpoints import plain_pickle
from semaim.data.labelled import LabelledImages
from semaim.encoders import sources
from semaim.encoders.contract import build
from semaim.encoders.images import Preparation, cfg_of, preparation_of_arch
from semaim.encoders.own import OwnEncoder
from semaim.encoders.sources import open_source
from semaim.engine.config import load_config
from semaim.engine.encoders import settle_images
from semaim.errors import UserError

TAG = "test_vit.r160_in1k"  #: of a network of timm's that is tiny
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def config_of(tag, **model_args):
    """timm's config.json on the hub."""
    cfg = timm.get_pretrained_cfg(tag).to_dict()
    return {"architecture": tag.partition(".")[0], "num_classes": 1000, "pretrained_cfg": cfg, "model_args": model_args}


@pytest.fixture(scope="module")
def weights():
    """Random weights of timm's network, with its classifier."""
    return random_state(timm.create_model("test_vit"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "hub"


@pytest.fixture
def cached(cache, weights):
    """The cache with timm's weights."""
    folder = cache / f"models--timm--{TAG}"
    snapshot = folder / "snapshots" / COMMIT
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    write(snapshot, weights, config_of(TAG))
    return snapshot


def write(folder, state, config=None, name="model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(state), folder / name) if name.endswith("safetensors") else torch.save(state, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder / name


def assert_is_timms(source, weights):
    """The encoder computes what timm's network does, and nothing but its classifier is left."""
    encoder = source.build()
    report = encoder.load(source)
    assert {*source.left, *report.unexpected} == {"head.weight", "head.bias"} and not report.missing
    expected = timm.create_model("test_vit").eval()
    expected.load_state_dict(weights)
    images = images_of((160, 160))
    with torch.no_grad():
        found = encoder.eval()(images)
        torch.testing.assert_close(found, expected.forward_features(images), atol=1e-5, rtol=1e-5)
    assert source.description == {"family": "timm", "arch": "test_vit", "args": {}, "patch_size": None}
    assert source.size == source.preparation.size == (160, 160)


# Names


@pytest.mark.parametrize(
    "name", ["timm:test_vit", f"timm:{TAG}", f"hf-hub:timm/{TAG}", f"hf-hub:timm/{TAG}@main", f"hf_hub:timm/{TAG}"]
)
def test_names_open_what_the_hub_has(name, cached, weights):
    source = open_source(name)
    assert source.path == cached / "model.safetensors" and source.name == name
    assert_is_timms(source, weights)
    assert source.preparation.crop_pct == 0.95 and source.preparation.statistics.mean == (0.5, 0.5, 0.5)


def test_weights_in_the_cache_are_opened_by_a_run(cached):
    cfg = Config({"model": {"network": {"type": "PlainClassifier", "encoder": None}}, "dataset": {"crop_pct": None}})
    statistics = settle_images(cfg, f"timm:{TAG}")
    assert cfg.model.network.encoder.arch == "test_vit" and cfg.model.network.img_size == 160
    assert statistics.std == (0.5, 0.5, 0.5) and cfg.dataset.mean == [0.5, 0.5, 0.5]
    assert (cfg.dataset.crop_pct, cfg.dataset.crop_mode, cfg.dataset.interpolation) == (0.95, "center", "bicubic")


def test_folders_and_files(tmp_path, weights):
    path = write(tmp_path / "a", weights, config_of(TAG))
    assert_is_timms(open_source(f"local-dir:{tmp_path / 'a'}"), weights)
    assert_is_timms(open_source(path), weights)
    only = write(tmp_path / "b", {"state_dict": weights, "epoch": 3}, name="checkpoint.pth")
    for arch in (TAG, "test_vit"):
        source = open_source(only, arch)
        assert_is_timms(source, weights)
        assert source.preparation.statistics.mean == (0.5, 0.5, 0.5)  # all of timm's weights for it agree
    wrapped = {f"module.backbone.{name}": tensor for name, tensor in weights.items()} | {"neck.weight": torch.ones(2)}
    source = open_source(write(tmp_path / "c", wrapped, name="wrapped.pth"), TAG)
    encoder = source.build()
    assert encoder.load(source).unexpected == ["neck.weight", "head.weight", "head.bias"]


def test_arguments_in_the_config_are_the_networks(tmp_path):
    arch = "vit_small_patch14_reg4_dinov2"
    path = write(tmp_path, state_of(arch), config_of(f"{arch}.lvd142m", **narrow(arch), num_classes=0))
    source = open_source(path)
    encoder = source.build(img_size=84)
    encoder.load(source)
    images = images_of((84, 84))
    with torch.no_grad():
        expected = reference(arch, (84, 84)).forward_features(images)
        torch.testing.assert_close(encoder.eval()(images), expected, atol=1e-5, rtol=1e-5)


def test_tensors_alone_tell_an_architecture_or_its_candidates(tmp_path, monkeypatch):
    monkeypatch.setattr(plain_pickle, "TIMES", 10**9)  # small files in place of large ones

    def file_of(arch):
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in timm.create_model(arch).state_dict().items()}
        path = tmp_path / f"{arch}.pth"  # of one stored number: tensors are views of it
        torch.save({name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}, path)
        return path

    source = open_source(file_of("vit_small_patch14_reg4_dinov2"))
    assert source.description["arch"] == "vit_small_patch14_reg4_dinov2"
    assert source.preparation.crop_pct == 1.0
    with pytest.raises(UserError) as error:
        open_source(path := file_of("vit_base_patch16_clip_224"))
    for part in ("does not determine its architecture", "vit_base_patch16_clip_quickgelu_224", "activation", "--arch"):
        assert part in str(error.value)
    assert open_source(path, "vit_base_patch16_clip_224.openai").preparation.crop_mode == "center"


def test_our_own_vit_is_told_by_its_tensors(tmp_path):
    own = OwnEncoder(embed_dim=32, depth=2, num_heads=2, patch_size=4, img_size=16)
    content = {"format": "semaim", "model": own.state_dict(), "config": {"model": {"network": own_config()}}}
    torch.save(content, tmp_path / "own.pth")
    source = open_source(tmp_path / "own.pth")
    encoder = source.build()
    encoder.load(source)
    images = images_of((16, 16))
    assert isinstance(encoder, OwnEncoder) and torch.equal(encoder.eval()(images), own.eval()(images))


def own_config():
    return {"type": "SemAIM", "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "img_size": 16}


# Mistakes


@pytest.mark.parametrize(
    ("source", "arch", "message"),
    [
        ("timm:test_vitt", None, "has no architecture 'test_vitt': did you mean test_vit"),
        ("timm:test_vit.r161_in1k", None, "has no weights test_vit.r161_in1k: did you mean r160_in1k"),
        (
            "timm:vit_base_patch16_18x2_224",
            None,
            "has no weights for vit_base_patch16_18x2_224: give a file and --arch",
        ),
        ("timm:resnet50", None, "resnet50 is no plain ViT"),
        ("timm:swin_tiny_patch4_window7_224.ms_in1k", None, "swin_tiny_patch4_window7_224 is no plain ViT"),
        ("timm:test_vit", "test_vit", "timm:test_vit names its architecture: leave --arch out"),
        ("local-dir:nowhere", None, "local-dir:nowhere: no such folder"),
        ("nowhere.pth", "test_vit", "nowhere.pth"),
        ("FILE", "resnet50", "resnet50 is no plain ViT"),
        ("FILE", "test_vitt", "has no architecture 'test_vitt': did you mean test_vit"),
        ("FILE", "test_vit.r161_in1k", "has no weights test_vit.r161_in1k"),
        ("FILE", "vit_tiny_patch16_224", "is no vit_tiny_patch16_224: "),
        ("hf-hub:timm/nothing", None, "cannot get timm/nothing from the Hugging Face hub: .*FILE --arch NAME"),
        (f"timm:{TAG}", None, "cannot get timm/test_vit.r160_in1k from the Hugging Face hub: .*FILE --arch NAME"),
    ],
)
def test_mistakes_are_named_in_a_line(source, arch, message, cache, weights, tmp_path):
    path = write(tmp_path, weights, name="weights.pth")
    with pytest.raises(UserError, match=message) as error:
        opened = open_source(path if source == "FILE" else source, arch)
        opened.build().load(opened)
    assert "\n" not in str(error.value)


def test_a_folder_with_no_or_many_files_of_weights_is_refused(tmp_path, weights):
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(UserError, match="a folder with one file of weights is needed .*; it has none"):
        open_source(f"local-dir:{tmp_path}")
    for name in ("a.pth", "b.pth"):
        write(tmp_path, weights, name=name)
    with pytest.raises(UserError, match="it has a.pth, b.pth"):
        open_source(f"local-dir:{tmp_path}")


def test_a_repository_without_weights_and_a_hub_out_of_reach_are_told(cached, monkeypatch):
    (cached / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"cannot get timm/{TAG} from the Hugging Face hub"):
        open_source(f"timm:{TAG}")

    def unreachable(*_, **__):
        raise ConnectionError("Name or service\nnot known")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(UserError, match=f"cannot get timm/{TAG} from the .*: Name or service not known; with a file"):
        open_source(f"timm:{TAG}")


def test_weights_in_the_cache_need_no_network(cached, monkeypatch):
    """Without network the hub's library gives the files of its cache, and raises for others."""
    monkeypatch.delenv("HF_HUB_OFFLINE")

    def from_cache(_, name, **__):
        if not (cached / name).is_file():
            raise LocalEntryNotFoundError("no connection")
        return str(cached / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", from_cache)
    assert open_source(f"timm:{TAG}").path == cached / "model.safetensors"


# Whole files only

WHOLE = (
    "vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224", "deit3_small_patch16_224", "beit_base_patch16_224",
    "eva02_tiny_patch14_224", "vit_small_patch16_rope_mixed_224", "vit_small_patch16_dinov3_qkvb",
    "aimv2_large_patch14_224", "vit_so150m2_patch16_reg1_gap_256",
)  # fmt: skip


def loads(arch, state, encoder):
    path = Path("weights.pth")
    encoder.load(sources.of_timm("weights.pth", path, arch, narrow(arch), preparation_of_arch(arch, path), state))


@pytest.mark.parametrize("arch", WHOLE)
def test_no_tensor_can_be_missing_or_have_another_name_or_shape(arch):
    """None but the classifier's: no encoder computes with them."""
    whole = random_state(timm.create_model(arch, num_classes=3, **narrow(arch)))
    with torch.device("meta"):
        encoder = build({"family": "timm", "arch": arch, "args": narrow(arch)})
    loads(arch, whole, encoder)
    allowed = []
    for name in whole:
        without = {other: tensor for other, tensor in whole.items() if other != name}
        doubled = {**whole, name: whole[name].repeat(2, *[1] * (whole[name].ndim - 1))}
        states = [without, {**without, f"{name}_": whole[name]}, doubled]
        for state in states[: 2 if name.endswith("table") else 3]:  # a table is of any size, see below
            try:
                loads(arch, state, encoder)
            except UserError as error:
                named = name if name in str(error) else re.sub(r"\.\d+(?=\.)", ".*", name)
                # Without a projection of patches nothing is recognised as an encoder.
                assert named in str(error) or name == "patch_embed.proj.weight" and "no ViT encoder" in str(error)
            else:
                allowed.append(name)
    assert set(allowed) == {name for name in whole if name.startswith("head.")}


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("beit_base_patch16_224", "blocks.0.attn.relative_position_bias_table"),
        ("vit_tiny_patch16_224", "pos_embed"),
        ("eva02_tiny_patch14_224", "pos_embed"),
    ],
)
def test_tables_of_no_square_grid_are_refused_by_name(arch, name):
    state = state_of(arch)
    state[name] = state[name][:-2] if name.endswith("table") else state[name][:, :-2]
    encoder = build({"family": "timm", "arch": arch, "args": narrow(arch)})
    with pytest.raises(UserError, match=re.escape(name)):
        loads(arch, state, encoder)


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("blocks.0.ls1.gamma", True),
        ("blocks.2.norm1.weight", True),
        ("blocks.0.attn.rel_pos_h", True),
        ("norm_pre.weight", True),
        ("reg_token", True),
        ("fc_norm.weight", True),
        ("attn_pool.latent", True),
        ("something.weight", True),
        ("head.weight", False),
        ("decoder_blocks.0.norm1.weight", False),
    ],
)
def test_tensors_besides_the_architectures_are_refused_by_name(name, refused):
    arch = "vit_tiny_patch16_224"
    state, encoder = (
        {**state_of(arch), name: torch.ones(64)},
        build({"family": "timm", "arch": arch, "args": narrow(arch)}),
    )
    if not refused:
        return loads(arch, state, encoder)
    with pytest.raises(UserError, match=re.escape(re.sub(r"\.\d+(?=\.)", ".*", name)) + ", which that architecture"):
        loads(arch, state, encoder)


# Images


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A class folder with an image larger than all crops, one that is oblong and small, and a grey one."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "val" / "thing").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index, (width, height) in enumerate([(700, 613), (301, 180), (224, 224)]):
        noise = generator.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((width, height))
        (image.convert("L") if index == 2 else image).save(folder / "val" / "thing" / f"{index}.png")
    return folder


@pytest.mark.parametrize(
    "tag",
    [
        "vit_base_patch16_siglip_224.webli", "vit_base_patch16_siglip_gap_224.v2_webli",
        "eva_large_patch14_196.in22k_ft_in1k",
        "vit_base_patch16_lingbot.robbyant",
        "vit_base_patch16_224_miil.in21k",
        "vit_base_patch16_clip_224.openai", "vit_base_patch16_clip_224.laion2b", "vit_large_patch14_clip_336.openai",
        "vit_small_patch14_dinov2.lvd142m", "vit_small_patch16_dinov3.lvd1689m",
        "beit_base_patch16_224.in22k_ft_in22k", "deit3_small_patch16_384.fb_in22k_ft_in1k", "deit_tiny_patch16_224",
        "eva02_base_patch14_448.mim_in22k_ft_in22k_in1k", "eva02_base_patch16_clip_224.merged2b",
        "aimv2_large_patch14_224.apple_pt", "vit_base_patch16_224.augreg_in21k", "vit_base_patch16_224.mae",
        "vit_pe_core_base_patch16_224.fb", "flexivit_small.1200ep_in1k",
    ],
)  # fmt: skip
def test_images_reach_the_encoder_as_timm_prepares_them(tag, pictures):
    found = Preparation.of_cfg(cfg_of(tag), tag)
    data = LabelledImages(
        str(pictures),
        found.size[0],
        "val",
        crop_pct=found.crop_pct,
        crop_mode=found.crop_mode,
        interpolation=found.interpolation,
        mean=found.statistics.mean,
        std=found.statistics.std,
    )
    config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(tag).to_dict())
    transform = create_transform(**config)
    assert len(data) == 3
    for index, path in enumerate(sorted(pictures.rglob("*.png"))):
        expected = transform(Image.open(path).convert("RGB"))
        assert data[index]["image"].shape == (3, *config["input_size"][1:])
        torch.testing.assert_close(data[index]["image"], expected, atol=0, rtol=0)


def test_weights_of_an_architecture_alone_tell_what_timms_weights_agree_in():
    agreed = preparation_of_arch("vit_small_patch16_dinov3", Path("a.pth"))
    assert agreed.statistics is not None and agreed.size == (256, 256)
    open_ = preparation_of_arch("vit_base_patch16_224", Path("a.pth"))
    assert open_.statistics is None and "a.pth are not known" in open_.unknown and "--arch vit_base" in open_.unknown
    assert preparation_of_arch("vit_base_patch16_224.mae", Path("a.pth")).statistics is not None


def test_a_crop_that_timms_weights_disagree_on_is_asked_for():
    """CLIP's tags of one architecture have the same mean and different crops."""
    cfg = load_config("semaim/configs/knn/plain_vit.py")
    cfg.arch = "vit_base_patch16_clip_224"
    with pytest.raises(UserError, match="crop of .* is not known.*--arch NAME.TAG"):
        settle_images(cfg, None)
    cfg.arch += ".openai"
    assert settle_images(cfg, None).origin.endswith("openai") and cfg.dataset.crop_pct == 0.9
    cfg = load_config("semaim/configs/knn/plain_vit.py", {"dataset.crop_pct": 0.875})
    cfg.arch = "vit_base_patch16_clip_224"
    settle_images(cfg, None)
    assert cfg.dataset.crop_pct == 0.875
