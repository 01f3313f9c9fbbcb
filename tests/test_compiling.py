"""Compiled blocks: one graph each, the numbers of uncompiled ones, no further compilation after the first rounds."""

import logging

import pytest
import torch
from commands import flags, losses, tool
from torch._dynamo.utils import counters

from semaim.encoders.networks import PlainClassifier, PlainSegmentationViT, PlainViTDet
from semaim.engine import compiling
from semaim.engine.compiling import blocks_of, compile_blocks, compile_for, obstacle
from semaim.engine.training import train
from semaim.errors import UserError
from semaim.models import FeatureTarget, PixelTarget, SemAIM
from semaim.models.classifier import Classifier
from semaim.models.mae import MAE
from semaim.models.segvit import SegmentationViT
from semaim.models.vit import Block
from semaim.models.vitdet import ViTDet

SMALL = {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 32, "patch_size": 8}
PIXELS = PixelTarget((8, 8), blur_kernel=3)
DINO, EVA, BEIT = "vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_224", "beit_base_patch16_224"


def described(arch):
    return {"family": "timm", "arch": arch, "args": {"depth": 2}}


NETWORKS = {
    "SemAIM": lambda: SemAIM(PIXELS, **SMALL),
    "SemAIM, shallow": lambda: SemAIM(PIXELS, decoder_depth=2, **SMALL),
    "SemAIM, shared": lambda: SemAIM(PIXELS, share_weights=True, **SMALL),
    "SemAIM, attention map": lambda: SemAIM(PIXELS, similarity="self", **SMALL),
    "SemAIM, features": lambda: SemAIM(FeatureTarget(), guide="ema", **SMALL),
    "SemAIM, recomputed": lambda: SemAIM(PIXELS, with_cp=True, **SMALL),
    "MAE": lambda: MAE(PixelTarget((8, 8), blur_kernel=0), decoder_embed_dim=16, decoder_depth=2, **SMALL),
    "classifier": lambda: Classifier(7, "avg", **SMALL),
    "ViTDet": lambda: ViTDet(**SMALL, window_size=3, global_blocks=(1, 3)),
    "UperNet": lambda: SegmentationViT(**SMALL, layer_scale=0.1),
    "plain classifier": lambda: PlainClassifier(described(DINO), 7, img_size=28),
    "plain ViTDet": lambda: PlainViTDet(described(EVA), img_size=112, patch_size=16, window_size=3),
    "plain UperNet": lambda: PlainSegmentationViT(described(BEIT), img_size=64),
}


def loss_of(model, images, draw):
    """The network's loss, or of an encoder the mean square of its maps."""
    out = model(images, draw) if isinstance(model, SemAIM | MAE) else model(images)
    if hasattr(out, "loss"):
        return out.loss
    return sum(one.square().mean() for one in (out if isinstance(out, tuple) else (out,)))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_block_is_one_graph_with_the_same_numbers(name):
    torch.manual_seed(0)
    model = NETWORKS[name]()
    side = model.img_size[0] if name.startswith("plain") and hasattr(model, "img_size") else None
    side = side or {"plain classifier": 28, "plain ViTDet": 112, "plain UperNet": 64}.get(name, 32)
    images, draw = torch.randn(2, 3, side, side), torch.rand(2, 16)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    expected = loss_of(model, images, draw)
    wanted = torch.autograd.grad(expected, weights, allow_unused=True)
    torch._dynamo.reset()
    for block in blocks_of(model):
        block.compile(backend="aot_eager", fullgraph=True)  # a break of the graph is an error
    counters.clear()
    found = loss_of(model, images, draw)
    gradients = torch.autograd.grad(found, weights, allow_unused=True)
    assert counters["stats"]["unique_graphs"] >= 1 and not counters["graph_break"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.fixture
def cheap(monkeypatch):
    """The compiler's front end alone, which decides what is compiled anew."""
    compile_it = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: compile_it(module, backend="eager"))
    monkeypatch.setattr(compiling, "obstacle", lambda device: None)
    torch._dynamo.reset()
    counters.clear()


def graphs_after(epoch, monkeypatch):
    """The list to which a run appends the number of compiled functions after each epoch from this one on."""
    seen = []
    run_epoch = torch.nn.Module.train

    def training(module, mode=True):
        if mode and type(module).__name__ in ("Pretraining", "Classification"):
            seen.append(counters["stats"]["unique_graphs"])
        return run_epoch(module, mode)

    monkeypatch.setattr(torch.nn.Module, "train", training)
    return seen


def test_a_pretraining_compiles_in_its_first_epoch_alone(tiny_config, cheap, monkeypatch):
    seen = graphs_after(1, monkeypatch)
    train(tiny_config(compile=True, **{"train_cfg.max_epochs": 3, "default_hooks.pictures.interval": 1}))
    assert len(seen) >= 3 and seen[0] < seen[-1]
    assert seen[-1] == counters["stats"]["unique_graphs"] == seen[-2]
    assert not counters["graph_break"]


def test_a_fine_tuning_with_smaller_last_batches_compiles_in_its_first_epochs_alone(
    labelled, tmp_path, cheap, monkeypatch
):
    from semaim.engine.config import load_config

    options = {
        "dataset.root": str(labelled), "model.network.drop_path_rate": 0.1,
        "num_workers": 0, "total_batch_size": 6, "train_cfg.max_epochs": 5, "param_scheduler.warmup": 0.2,
        "model.mixup": 0.0, "model.cutmix": 0.0, "compile": True,
    }  # fmt: skip
    cfg = load_config("semaim/configs/finetune/vit_tiny_scenes.py", options)
    cfg.work_dir = str(tmp_path / "run")
    seen = graphs_after(1, monkeypatch)
    train(cfg)
    assert seen[0] < seen[2] == seen[-1] == counters["stats"]["unique_graphs"]


LOG = logging.getLogger("test_compiling")
GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    "compile, device, steps, fsdp, expected",
    [
        ("auto", GPU, 10_000, False, True), ("auto", GPU, 9_999, False, False), ("auto", GPU, 10_000, True, False),
        ("auto", CPU, 10**6, False, False), ("auto", GPU, 0, False, False), (True, CPU, 0, False, True),
        (True, GPU, 1, True, True), (False, GPU, 10**6, False, False),
    ],
)  # fmt: skip
def test_auto_compiles_long_trainings_on_a_gpu(compile, device, steps, fsdp, expected, tiny_config, monkeypatch):
    compiled = []
    monkeypatch.setattr(compiling, "obstacle", lambda device: None)
    monkeypatch.setattr(compiling, "compile_blocks", lambda model: compiled.append(model) or 1)
    cfg = tiny_config(compile=compile, fsdp=fsdp)
    assert compile_for(cfg, torch.nn.Identity(), steps, device, LOG) == expected == bool(compiled)


def test_a_compiler_that_does_not_work_is_one_line(tiny_config, monkeypatch, caplog):
    def broken(function):
        raise RuntimeError("InvalidCxxCompiler: no C++ compiler\n\nmore lines")

    monkeypatch.setattr(torch, "compile", broken)
    assert obstacle(CPU) == "InvalidCxxCompiler: no C++ compiler"
    with pytest.raises(UserError, match=r"compile=True: .*no C\+\+ compiler\): mend that, or set compile=False$"):
        compile_for(tiny_config(compile=True), torch.nn.Identity(), 1, CPU, LOG)
    monkeypatch.setattr(compiling, "obstacle", lambda device: "Triton is not installed")
    with caplog.at_level(logging.WARNING):
        assert not compile_for(tiny_config(compile="auto"), torch.nn.Identity(), 10**6, GPU, LOG)
    assert caplog.messages == ["blocks are not compiled: Triton is not installed; training is slower"]


def test_a_gpu_without_triton_is_an_obstacle(monkeypatch):
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    assert obstacle(GPU) == "Triton is not installed"


@pytest.mark.slow
def test_blocks_compiled_by_the_real_compiler_keep_less_than_it_would_by_itself(monkeypatch):
    """Counted as autograd keeps it; the compiler's own choice keeps outputs of norms and activations too."""

    def kept(share):
        monkeypatch.setattr(compiling, "KEPT_SHARE", share)
        torch._dynamo.reset()
        block, tokens, storages = Block(32, 2), torch.randn(2, 17, 32, requires_grad=True), {}
        compile_blocks(block)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: storages.setdefault(id(t), t), lambda t: t):
            out = block(tokens)
        out.sum().backward()
        return sum(t.untyped_storage().nbytes() for t in storages.values() if t.shape[:2].numel() >= 17)

    assert kept(compiling.KEPT_SHARE) < 0.8 * kept(1.0)


@pytest.mark.slow
def test_a_run_compiled_by_the_real_compiler_has_the_same_losses(scenes, tmp_path):
    small = {
        "model.network.embed_dim": 32, "model.network.num_heads": 2, "model.network.depth": 2, "num_workers": 0,
        "total_batch_size": 8, "train_cfg.max_epochs": 1, "param_scheduler.warmup": 0.5,
        "default_hooks.logger.interval": 1, "log_processor.window_size": 1,
    }  # fmt: skip
    for name, compile in (("plain", False), ("compiled", True)):
        line = ["semaim/configs/pretrain/semaim_vit_tiny_scenes.py", 1, "--data-root", scenes]
        done = tool("pretrain.sh", *line, "--work-dir", tmp_path / name, *flags({**small, "compile": compile}))
        assert done.returncode == 0, done.stderr
    assert "first step, with compilation: " in done.stdout + done.stderr
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
