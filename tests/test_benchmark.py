"""The baselines of the benchmarks are what they are said to be, and the tool runs and refuses as it should."""

import json
import math
import re
from unittest.mock import patch

import numpy as np
import oracle
import pytest
import torch
from commands import one_line, tool
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend
from torch.utils.data import DataLoader

from semaim.benchmarks import measuring, neighbours, pretraining
from semaim.benchmarks.baselines import ExplicitMasks, PlainImages, plain_map_attention, published_step
from semaim.benchmarks.detection import block_pass, build_block
from semaim.benchmarks.loading import check_pixels, write_textures
from semaim.benchmarks.rows import Row, without_gpu
from semaim.benchmarks.scaling import exponent
from semaim.data.decoding import load_image, load_pixels
from semaim.data.folder import PretrainImages
from semaim.engine.evaluation import Frozen
from semaim.errors import UserError
from semaim.models import PixelTarget, SemAIM, cpu_products
from semaim.models.cpu_products import LEAST_WORK, product
from semaim.models.recompute import linear
from semaim.models.vit import Mlp
from semaim.models.vitdet import MapAttention
from semaim.tasks.knn import NearestNeighbours

ORDERS = ("semantic", "similarity", "semantic_rings", "raster", "stochastic", "center_out")


def small(order="semantic", dtype=torch.float32, **kwargs):
    """A model of width 32 on 4 x 4 patches, with all weights random, images and draws."""
    torch.manual_seed(0)
    options = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, order=order, **kwargs)
    model = SemAIM(PixelTarget((8, 8), blur_kernel=3), **options)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model.to(dtype), torch.randn(3, 3, 32, 32, dtype=dtype), torch.rand(3, 16, dtype=dtype)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("options", [{}, {"decoder_depth": 2, "head": "linear"}], ids=["deep", "shallow"])
def test_explicit_masks_give_our_loss_and_gradients(order, options):
    model, images, draw = small(order, torch.float64, **options)
    weights = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = model(images, draw).loss, ExplicitMasks(model)(images, draw)
    assert torch.allclose(ours, theirs, rtol=1e-6)  # the similarity is computed in fp32
    for a, b in zip(torch.autograd.grad(ours, weights), torch.autograd.grad(theirs, weights), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-10)


def test_explicit_masks_give_the_oracles_loss():
    model, images, draw = small("semantic", torch.float64)
    explicit = ExplicitMasks(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    sizes = dict(patch=(8, 8), depth=4, heads=2, decoder_depth=4)
    prediction = oracle.predict(images, parameters, explicit.keys(images, draw), **sizes)
    loss = oracle.pixel_loss(prediction, oracle.pixel_target(images, (8, 8), blur_kernel=3)).mean()
    assert torch.allclose(explicit(images, draw), loss, rtol=1e-6)


def test_masks_are_the_oracles():
    key = torch.rand(2, 5)
    content, query = ExplicitMasks.masks(key)
    assert content.dtype == torch.float32 and content.shape == (2, 1, 6, 6)
    for mine, seen in zip((content, query), oracle.visible(key), strict=True):
        assert torch.equal(mine[:, 0], oracle.additive(seen))


def test_both_steps_train_alike():
    setting = pretraining.Setting("tiny", batch=2, img_size=32, depth=2)
    losses = []
    for variant in ("ours", "baseline"):
        step = pretraining.build_step(variant, setting)
        losses.append([float(step()) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][2] < losses[0][0]


def test_the_baselines_optimizer_is_the_default_one():
    model, images, draw = small()
    groups = pretraining.groups_of(model)
    step = published_step(ExplicitMasks(model), images, draw, groups, (0.9, 0.95))
    optimizer = next(c.cell_contents for c in step.__closure__ if isinstance(c.cell_contents, torch.optim.Optimizer))
    assert type(optimizer) is torch.optim.AdamW
    assert all(group["fused"] is None and group["foreach"] is None for group in optimizer.param_groups)
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}


def test_unequal_forms_are_not_timed(monkeypatch):
    model, images, draw = small()
    monkeypatch.setattr(ExplicitMasks, "keys", lambda self, images, draw: draw)
    with pytest.raises(UserError, match="losses of ours and of the baseline differ by .* not timed"):
        pretraining.check_parity(model, images, draw)


def test_kernels_of_attention_are_compared(monkeypatch):
    monkeypatch.setitem(pretraining.KERNELS, "CPU", (SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION))
    rows = pretraining.attention(pretraining.Setting("tiny", batch=1, img_size=112), repeats=1)
    named = [row for row in rows if "the same by" in row.what]
    assert len(named) == len(rows) // 2 and all("math" in row.what for row in named)  # cuDNN is not on a CPU
    assert all(row.ours > 0 and row.loss_difference < 1e-4 for row in named)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_plain_map_attention_is_ours(grid):
    torch.manual_seed(0)
    attention = MapAttention(32, 2, table=(4, 4)).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    maps = torch.randn(2, *grid, 32, dtype=torch.float64)
    assert torch.allclose(attention(maps), plain_map_attention(attention, maps), rtol=1e-9)


def test_plain_block_is_ours():
    block, maps = build_block("tiny", 64, 1, "cpu")
    (ours, of_ours), (plain, of_plain) = (block_pass(name, block, maps)() for name in ("ours", "baseline"))
    assert torch.allclose(ours, plain, atol=1e-5)
    assert measuring.relative_difference(of_ours, of_plain) < 1e-4


def test_linear_layers_with_and_without_one_dnn_agree():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(4, 50, 96), torch.randn(256, 96), torch.randn(256)
    assert x.numel() * len(weight) > LEAST_WORK
    inputs = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = nn.functional.linear(nn.functional.gelu(inputs[0]), *inputs[1:])
    expected = [expected, *torch.autograd.grad(expected.sin().sum(), inputs)]
    for enabled in {cpu_products.ONE_DNN, False}:
        with patch.object(cpu_products, "ONE_DNN", enabled):
            mine = [t.clone().requires_grad_() for t in (x, weight, bias)]
            out = linear(*mine, nn.functional.gelu)
            for a, b in zip([out, *torch.autograd.grad(out.sin().sum(), mine)], expected, strict=True):
                assert a.dtype == torch.float32 and measuring.relative_difference([a], [b]) < 1e-5
            assert torch.allclose(product(x, weight), x @ weight.T, atol=1e-3)


def test_linear_layers_keep_frozen_parts_without_gradient():
    x, weight, bias = torch.randn(3, 8), torch.randn(4, 8, requires_grad=True), torch.randn(4)
    linear(x, weight, bias).sum().backward()
    assert torch.allclose(weight.grad, x.sum(0).expand(4, -1), atol=1e-6)
    x.requires_grad_()
    weight = weight.detach()
    linear(x, weight, bias, nn.functional.gelu).sum().backward()
    assert x.grad is not None and weight.grad is None and bias.grad is None
    assert not linear(x.detach(), weight, bias).requires_grad


@pytest.mark.parametrize("before", [None, nn.functional.gelu])
def test_linear_layers_under_autocast_are_torchs(before):
    torch.manual_seed(0)
    x, weight, bias = (t.requires_grad_() for t in (torch.randn(2, 40, 64), torch.randn(48, 64), torch.randn(48)))
    found = []
    for mine in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            y = before(x) if before and not mine else x
            out = linear(x, weight, bias, before) if mine else nn.functional.linear(y, weight, bias)
        assert out.dtype == torch.bfloat16
        found.append((out, *torch.autograd.grad(out.float().sin().sum(), (x, weight, bias))))
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype and measuring.relative_difference([a], [b]) < 1e-2


def test_linear_layers_run_without_memory():
    layer = Mlp(8, 16).to("meta")
    out = layer(torch.empty(2, 3, 8, device="meta", requires_grad=True), nn.LayerNorm(8, device="meta"))
    out.sum().backward()
    assert out.shape == (2, 3, 8) and layer.fc1.weight.grad.shape == (16, 8)


@pytest.mark.parametrize(
    "mode, name",
    [(mode, name) for mode in ("RGB", "L") for name in ("a.jpg", "a.JPEG", "a.png")] + [("CMYK", "a.jpg")],
)
def test_pixels_are_pillows(tmp_path, mode, name):
    pixels = np.random.default_rng(0).integers(0, 255, (37, 53, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x112] = 6  # "rotate": neither does
    Image.fromarray(pixels).convert(mode).save(tmp_path / name, exif=turned)
    found = load_pixels(str(tmp_path / name)).permute(1, 2, 0).numpy().astype(int)
    expected = np.asarray(load_image(str(tmp_path / name))).astype(int)
    assert found.shape == expected.shape and abs(found - expected).max() <= (mode == "CMYK")


def test_a_png_called_jpeg_is_read(tmp_path):
    Image.new("RGB", (20, 10), "red").save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert load_pixels(str(tmp_path / "a.jpg")).shape == (3, 10, 20)


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff", b"hello"])
def test_broken_jpegs_are_named(tmp_path, content):
    (tmp_path / "broken.jpg").write_bytes(content)
    with pytest.raises(UserError, match="cannot read image .*broken.jpg"):
        load_pixels(str(tmp_path / "broken.jpg"))
    with pytest.raises(UserError, match="cannot read image .*gone.jpg: no such file"):
        load_pixels(str(tmp_path / "gone.jpg"))


def test_both_loaders_see_the_same_crops(tmp_path):
    write_textures(tmp_path, 4, (250, 188))
    ours, plain = PretrainImages(str(tmp_path), 64), PlainImages(tmp_path, 64)
    assert check_pixels(ours, plain) < 0.5
    assert next(iter(DataLoader(plain, 4))).shape == (4, 3, 64, 64)
    ours.seed = 1
    plain.transform.transforms.pop(1)  # without flips they differ
    with pytest.raises(UserError, match="crops of ours and of the baseline differ"):
        check_pixels(ours, plain)


def test_turns_alternate_and_medians_are_taken(monkeypatch):
    calls, times = [], iter([1.0, 2.0, 3.0, 1.0, 1.0, 4.0])
    monkeypatch.setattr(measuring, "seconds", lambda work, device, inner: (calls.append(work()), next(times))[1])
    found = measuring.alternate(lambda: "a", lambda: "b", torch.device("cpu"), repeats=3, warmup=0)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert found == (1.0, 3.0, 3.0, (2.0, 4.0))


def test_memory_is_that_of_the_step_alone():
    assert 60e6 < measuring.cpu_peak(make_step, 64) < 80e6


def make_step(megabytes):
    """A step that fills so much memory and gives it back."""
    return lambda: torch.ones(megabytes * 250_000).sum()


def test_exponents():
    sizes = [1, 2, 4, 8]
    assert exponent(sizes, [size**2 for size in sizes]) == pytest.approx(2)
    assert exponent(sizes, [5, 5, 4, 8]) == pytest.approx(1)  # the small end does not count


def test_verdicts():
    assert Row("a", "CPU", "s", 2.0, ours=1, ratio=2.1).verdict == "met"
    assert Row("a", "CPU", "s", 2.0, ours=1, ratio=1.9).verdict == "missed"
    assert Row("a", "CPU", "s", 0.7, at_least=False, ours=1, ratio=0.6).verdict == "met"
    assert Row("a", "GPU", "", 0.5, of_ours=True, ours=0.4).verdict == "missed"
    assert Row("a", "CPU", "s", ours=1).verdict == "no target"
    assert without_gpu("a", "s", 3.0).verdict == "not measured: no GPU"


def rows_of(path, name):
    content = json.loads(path.read_text())
    assert content["benchmark"] == name and content["hardware"]["torch"] == torch.__version__
    assert content["hardware"]["cores"] and content["date"] and content["command"].startswith("benchmark.py")
    return content["rows"]


@pytest.mark.parametrize(
    "name, arguments, first",
    [
        ("pretrain", ["--model", "tiny", "--depth", 2, "--batch", 2, "--img-size", 64], "pretraining step"),
        ("attention", ["--model", "tiny", "--batch", 1, "--img-size", 112], "causal attention"),
        ("vitdet", ["--model", "tiny", "--img-size", 64], "ViTDet global block"),
        ("loader", ["--img-size", 32, "--batch", 8, "--workers", 1], "loader"),
    ],
)
@pytest.mark.slow
def test_the_tool_measures(name, arguments, first, tmp_path):
    out = tmp_path / "new" / "rows.json"
    if name == "loader":
        (tmp_path / "images").mkdir()
        write_textures(tmp_path / "images", 16, (100, 75))
        arguments = [*arguments, "--data", tmp_path / "images", "--copies", 48]
    done = tool("benchmark.py", name, *arguments, "--repeats", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    rows = rows_of(out, name)
    assert rows[0]["what"].startswith(first) and rows[0]["ratio"] > 0 and rows[0]["ours"] > 0
    assert rows[0]["spread"][0] <= rows[0]["ratio"] <= rows[0]["spread"][1]
    if name != "attention":
        assert any(row["verdict"] == "not measured: no GPU" for row in rows) and "no GPU" in done.stdout


@pytest.mark.slow
def test_the_tool_measures_scaling_and_processes(tmp_path):
    out = tmp_path / "scaling.json"
    sizes = ["--depth", 1, "--batch", 2, "--sides", 2, 4, "--batches", 1, 2, "--repeats", 1]
    done = tool("benchmark.py", "scaling", *sizes, "--out", out)
    assert done.returncode == 0, done.stderr
    rows = rows_of(out, "scaling")
    assert len(rows) == 9 and "2 processes" in rows[-1]["what"]
    assert Image.open(tmp_path / "scaling.png").size[0] > 500


@pytest.mark.slow
def test_the_tool_measures_startup(tmp_path):
    done = tool("benchmark.py", "startup", "--repeats", 1, "--out", tmp_path / "startup.json")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "startup.json", "startup")
    assert rows[-1]["what"] == "until the first step: in all" and rows[-1]["ours"] > 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["pretrain", "--device", "cuda"], "this machine has no GPU"),
        (["pretrain", "--batch", "0"], "give a whole number of 1 or more"),
        (["pretrain", "--img-size", "100"], "is no whole number of 16 x 16 patches"),
        (["pretrain", "--order", "semantik"], "did you mean semantic"),
        (["vitdet", "--img-size", "100"], "give a multiple of 16"),
        (["loader", "--data", "nowhere"], "no such folder"),
        (["startup", "--out", "rows.txt"], "name a .json file"),
    ],
)
def test_bad_flags_are_one_line(arguments, message):
    one_line(tool("benchmark.py", *arguments), message)


def test_neighbours_at_any_size_in_the_memory_that_is_given(capsys):
    """The command at a small size; the bound sets the rows at a time, and changes no figure."""
    sizes = ["--bank", "700", "--queries", "90", "--width", "16", "--memory-gb"]
    found = {}
    for gb in ("0.00006", "0.5"):  # 100 and 9,128 rows at a time
        assert neighbours.main([*sizes, gb]) == 0
        *accuracies, told, cost = capsys.readouterr().out.strip().splitlines()
        found[gb] = accuracies
        rows = math.isqrt(int(float(gb) * 1e9 / 6))
        assert f"90 queries among 700, 16 channels, {rows:,} rows at a time" in told
        assert re.search(r"\d+ s \(\d+ s of \d+ threads, \d+ GFLOP/s\), \d+\.\d\d GB of anonymous memory", cost)
    assert found["0.00006"] == found["0.5"] and len(found["0.5"]) == 5


def neighbours_step(gb):
    """k-NN of 6,000 random queries among as many."""
    rows = torch.randn(6000, 64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6000) % 7
    data = Frozen((rows, labels), (rows, labels), 7, torch.device("cpu"), lambda line: None)
    return lambda: NearestNeighbours(memory_gb=gb).run(data)


def test_neighbours_stay_in_their_memory():
    """What the similarities take, and 90 MB for libraries, the features, neighbours and votes of 6,000 queries."""
    small, large = (measuring.cpu_peak(neighbours_step, gb, steps=1) for gb in (0.02, 0.2))
    assert small < 0.02e9 + 90e6 < 0.13e9 < large < 0.2e9 + 90e6  # 5,773 x 5,773 similarities alone are 133 MB
    with pytest.raises(UserError, match="memory_gb 0"):
        NearestNeighbours(memory_gb=0).check([1] * 1000, [1], (64,))
