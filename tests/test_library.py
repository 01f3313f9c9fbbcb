"""The library: encoders give timm's tokens at any size, orders are those of the pretraining, imports are lazy."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision.transforms.functional as F
from PIL import Image
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import semaim
from semaim.checkpoints.files import read_checkpoint
from semaim.engine.pretraining import model_from_checkpoint
from semaim.errors import UserError
from semaim.models.ordering import ORDERS
from semaim.models.vit import VisionTransformer

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
CLIP = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}


@pytest.fixture(scope="module")
def tiny():
    """timm's ViT-Ti at any image size, every weight random."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.05)
    return model


@pytest.fixture(params=["pth", "timm folder"])
def file(request, tiny, tmp_path):
    """Its weights in a .pth, and in a folder of timm's, whose config.json has statistics of its own."""
    if request.param == "pth":
        torch.save({"model": tiny.state_dict(), "epoch": 3}, tmp_path / "x.pth")
        return tmp_path / "x.pth"
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "pretrained_cfg": CLIP}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tiny.state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_tokens_are_timms_at_any_size_and_statistics_those_of_the_file(tiny, file):
    before = torch.get_rng_state()
    encoder = semaim.load_encoder(file)
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers are as they were"
    assert isinstance(encoder, torch.nn.Module) and not any(module.training for module in encoder.modules())
    assert (encoder.num_prefix_tokens, encoder.embed_dim, encoder.patch_size) == (1, 192, (16, 16))
    assert encoder.report.whole and not encoder.report.missing and not encoder.report.unexpected
    bare = file.suffix == ".pth"
    expected = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if bare else (tuple(CLIP["mean"]), tuple(CLIP["std"]))
    assert (encoder.mean, encoder.std) == expected
    for size in ((224, 224), (288, 288), (96, 160)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            tokens = encoder(images)
            assert tokens.shape == (2, 1 + size[0] * size[1] // 256, 192)
            torch.testing.assert_close(tokens, tiny.forward_features(images), atol=1e-5, rtol=1e-5)


def test_a_checkpoint_opens_as_a_record(file):
    found = semaim.open_checkpoint(file)
    assert found.dialect == ("mae" if file.suffix == ".pth" else "timm")
    assert found.sizes == {
        "embed_dim": 192, "depth": 12, "num_heads": 3, "patch_size": (16, 16), "img_size": (224, 224), "mlp_ratio": 4,
    }  # fmt: skip
    assert found.epoch == (3 if file.suffix == ".pth" else None) and not found.skipped and found.classes is None


def test_an_encoder_that_computes_with_more_is_refused_unless_partial(tmp_path):
    model = timm.models.VisionTransformer(num_classes=0, init_values=0.1, **SIZES).eval()
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"it computes with blocks\.\*\.ls1\.gamma"):
        semaim.load_encoder(tmp_path / "x.safetensors")
    encoder = semaim.load_encoder(tmp_path / "x.safetensors", partial=True)
    assert not encoder.report.whole and len(encoder.report.unread) == 4
    own = encoder.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items() if ".ls" not in name)


def test_an_encoder_that_lacks_something_is_refused(tmp_path):
    state = VisionTransformer(**SIZES).state_dict()
    for name in ("norm.weight", "cls_token", "pos_embed"):
        torch.save({key: value for key, value in state.items() if key != name}, tmp_path / "x.pth")
        with pytest.raises(UserError, match=f"it lacks {name}"):
            semaim.load_encoder(tmp_path / "x.pth")
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "x.pth")
    for function in (semaim.load_encoder, semaim.open_checkpoint):
        with pytest.raises(UserError, match="no ViT encoder in .*it holds conv1"):
            function(tmp_path / "x.pth")


def test_a_checkpoint_of_the_pretraining_opens(pretrained):
    found, encoder = semaim.open_checkpoint(pretrained), semaim.load_encoder(pretrained)
    assert found.dialect == "semaim" and found.epoch == 1 and found.native
    assert (encoder.mean, encoder.std) == (found.statistics.mean, found.statistics.std)
    network = model_from_checkpoint(read_checkpoint(pretrained)).network
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(encoder(images), VisionTransformer.forward(network, images))


@pytest.mark.parametrize("similarity", ["cls", "gap", "self"])
@pytest.mark.parametrize("order", ORDERS)
def test_orders_are_those_of_the_pretraining(order, similarity, pretrained):
    encoder = semaim.load_encoder(pretrained)
    options = {"network.order": order, "network.similarity": similarity}
    network = model_from_checkpoint(
        read_checkpoint(pretrained), {f"model.{key}": value for key, value in options.items()}
    ).network
    for size, seed in (((32, 32), 0), ((48, 32), 7)):
        images = torch.randn(3, 3, *size)
        draw = torch.rand(3, size[0] * size[1] // 64, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            expected = network(images, draw)
            _, looked = network.look(images)
        found, places = semaim.order_of(encoder, images, order, similarity, seed)
        assert torch.equal(found, looked) and torch.equal(places, expected.order)
        assert places.dtype == torch.int64
        assert torch.equal(places.sort(dim=-1).values, torch.arange(draw.shape[1]).expand_as(places))


def test_an_order_is_repeated_by_its_seed(pretrained):
    encoder, images = semaim.load_encoder(pretrained), torch.randn(2, 3, 32, 32)
    similarity, order = semaim.order_of(encoder, images)
    assert all(map(torch.equal, semaim.order_of(encoder, images, "semantic", "cls", 0), (similarity, order)))
    assert torch.equal(order[:, 0], similarity.argmax(dim=-1)), "the most similar patch comes first"
    orders = [semaim.order_of(encoder, images, "stochastic", seed=seed)[1] for seed in (0, 1, 1)]
    assert not torch.equal(*orders[:2]) and torch.equal(*orders[1:])


def test_an_encoder_of_another_package_has_an_order_too():
    """timm's own: registers between class token and patches are no patches."""
    torch.manual_seed(1)
    model = timm.models.VisionTransformer(num_classes=0, reg_tokens=4, **SIZES).eval()

    class Tokens(torch.nn.Module):
        num_prefix_tokens, patch_size = 5, (8, 8)

        def forward(self, images):
            return model.forward_features(images)

    images = torch.randn(2, 3, 32, 32)
    similarity, order = semaim.order_of(Tokens(), images, "similarity")
    with torch.no_grad():
        tokens = model.forward_features(images)
    cosine = torch.cosine_similarity(tokens[:, :1], tokens[:, 5:], dim=-1)
    torch.testing.assert_close(similarity, cosine.softmax(-1))
    assert torch.equal(order, cosine.argsort(dim=-1, descending=True))
    with pytest.raises(UserError, match="needs the attention of a plain ViT, not a Tokens"):
        semaim.order_of(Tokens(), images, similarity="self")
    Tokens.num_prefix_tokens = 1
    with pytest.raises(UserError, match="20 tokens of patches for 4 x 4 patches: look at num_prefix_tokens"):
        semaim.order_of(Tokens(), images)
    Tokens.num_prefix_tokens = 0
    with pytest.raises(UserError, match="has no class token: choose gap"):
        semaim.order_of(Tokens(), images)


def test_what_cannot_be_is_said_in_one_line(pretrained):
    encoder, images = semaim.load_encoder(pretrained), torch.randn(1, 3, 32, 32)

    def refuses(message, images=images, **options):
        with pytest.raises(UserError, match=message) as error:
            semaim.order_of(encoder, images, **options)
        assert "\n" not in str(error.value)

    refuses("unknown order 'semantik': did you mean semantic", order="semantik")
    refuses("unknown similarity 'token': choose cls, gap or self", similarity="token")
    refuses("30 x 32 pixels is no whole number of 8 x 8 patches: resize or crop it", images[:, :, :30])
    refuses(r"images are \(3, 32, 32\) of float32: give normalised floats of shape \(B, 3, H, W\)", images[0])
    refuses(r"of uint8: give normalised floats", images.byte())
    with pytest.raises(UserError, match=r"images are \(1, 1, 32, 32\)"):
        encoder(images[:, :1])


def test_importing_the_package_imports_no_torch():
    code = "import sys, semaim; assert {'load_encoder', 'order_of', '__version__'} <= set(dir(semaim)); "
    code += "print(*[name for name in ('torch', 'timm', 'mmengine', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.strip() == "", done
    with pytest.raises(AttributeError, match="module 'semaim' has no attribute 'load_encodre'"):
        semaim.load_encodre  # noqa: B018
    assert semaim.load_encoder is semaim.library.load_encoder


def test_tasks_and_methods_are_listed():
    assert semaim.list_tasks()[:2] == ["pretrain", "knn"] == semaim.list_tasks()[:2]
    assert semaim.list_methods()[:3] == ["SemAIM", "MAE", "SimMIM"]
    assert {"list_tasks", "list_methods", "load_encoder"} <= set(dir(semaim))


def test_photographs_are_loaded_as_every_picture_crops_them_and_drawn(file, tmp_path):
    """The middle square, by torchvision alone."""
    encoder = semaim.load_encoder(file, img_size=64)
    rng = np.random.default_rng(0)
    for name, (height, width) in {"a.png": (80, 120), "b.png": (64, 64), "c.jpg": (200, 70)}.items():
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "page.txt").write_text("no image")
    files = [path for path in semaim.find_images(tmp_path) if "model" not in path]
    assert [Path(path).name for path in files] == ["a.png", "b.png", "c.jpg"]
    images = semaim.load_images(files, encoder)
    assert images.shape == (3, 3, 64, 64) and images.dtype == torch.float32
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.mean, encoder.std))
    for path, found in zip(files, images, strict=True):
        image = Image.open(path).convert("RGB")
        resized = F.center_crop(F.resize(image, 64, F.InterpolationMode.BICUBIC), [64, 64])
        torch.testing.assert_close(found, (F.to_tensor(resized) - mean) / std, atol=1e-5, rtol=0)
    assert semaim.load_images(files[:1], encoder, 96).shape == (1, 3, 96, 96)
    picture = semaim.draw_orders(files, encoder, "raster", "gap")
    assert picture.mode == "RGB" and picture.height > picture.width * 0.9  # three rows, three columns
    for wrong, message in ((files[0], "give a list of files"), ([], "no files of images"), (["x.png"], "x.png")):
        with pytest.raises(UserError, match=message):
            semaim.load_images(wrong, encoder)
