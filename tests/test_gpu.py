"""On a GPU: the same losses, gradients, features and results as on the CPU, and runs that resume, through the tools."""

import pytest
import torch
from commands import flags, losses, results, tool

from semaim.encoders.networks import PlainSegmentationViT, PlainViTDet
from semaim.models import FeatureTarget, PixelTarget, SemAIM
from semaim.models.mae import MAE
from semaim.models.segvit import SegmentationViT
from semaim.models.vitdet import SimpleFeaturePyramid, ViTDet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: runs where torch sees one"),
]

SCENES = "semaim/configs/pretrain/semaim_vit_tiny_scenes.py"
SMALL = {"size": "tiny", "depth": 2, "img_size": 64, "patch_size": 8}
PIXELS = {"target": PixelTarget((8, 8), blur_kernel=3)}
NETWORKS = {
    **{order: lambda order=order: SemAIM(**PIXELS, order=order, **SMALL) for order in ("semantic", "stochastic")},
    "attention map": lambda: SemAIM(**PIXELS, similarity="self", **SMALL),
    "features": lambda: SemAIM(FeatureTarget(), guide="ema", **SMALL),
    "mae": lambda: MAE(PixelTarget((8, 8), blur_kernel=0), decoder_embed_dim=64, decoder_depth=1, **SMALL),
}


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """No TF32 in convolutions, which torch allows there by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("name", NETWORKS)
def test_losses_and_gradients_are_those_of_a_cpu(name):
    torch.manual_seed(0)
    model = NETWORKS[name]()
    images, draw = torch.randn(4, 3, 64, 64), torch.rand(4, 64)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    found = {}
    for device in ("cpu", "cuda"):
        model.to(device)
        loss = model(images.to(device), draw.to(device)).loss
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        found[device] = loss.item(), torch.cat([g.flatten().cpu() for g in gradients if g is not None])
        weights = [weight for weight in model.parameters() if weight.requires_grad]
    assert found["cuda"][0] == pytest.approx(found["cpu"][0], rel=1e-5)
    difference = (found["cuda"][1] - found["cpu"][1]).norm() / found["cpu"][1].norm()
    assert difference < 1e-3
    with torch.autocast("cuda", torch.bfloat16):
        low = model(images.cuda(), draw.cuda()).loss.item()
    assert low == pytest.approx(found["cpu"][0], rel=2e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dense_encoders_are_those_of_a_cpu(precision):
    torch.manual_seed(0)
    encoders = (
        torch.nn.Sequential(ViTDet(**SMALL, window_size=3, global_blocks=(1,)), SimpleFeaturePyramid(192, 64, 8)),
        SegmentationViT(**SMALL, out_blocks=(0, 1)),
    )
    for encoder in encoders:
        for name, table in encoder.named_parameters():
            if "rel_pos" in name:
                torch.nn.init.normal_(table, std=0.2)
        images, maps = torch.randn(2, 3, 64, 64), {}
        for device in ("cpu", "cuda"):
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16" and device == "cuda"):
                out = encoder.to(device)(images.to(device))
            maps[device] = torch.cat([level.float().flatten().cpu() for level in out])
        difference = (maps["cuda"] - maps["cpu"]).norm() / maps["cpu"].norm()
        assert difference < (1e-5 if precision == "fp32" else 2e-2), type(encoder)


PLAIN = ("vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224", "beit_base_patch16_224")


@pytest.mark.parametrize("arch", PLAIN)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_maps_of_any_encoder_are_those_of_a_cpu(arch, precision):
    """Windows, prefix tokens, rotary positions and tables: maps, and the gradient of the patch projection."""
    torch.manual_seed(0)
    described = {"family": "timm", "arch": arch, "args": {"depth": 4}}
    for network in (PlainViTDet(described, img_size=224, patch_size=16), PlainSegmentationViT(described, img_size=128)):
        for name, weight in network.named_parameters():
            torch.nn.init.normal_(weight, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.05)
        side, found = network.encoder.img_size[0], {}
        images = torch.randn(2, 3, side, side)
        for device in ("cpu", "cuda"):
            network.to(device).zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16" and device == "cuda"):
                out = network(images.to(device))
            maps = torch.cat([level.float().flatten() for level in (out if isinstance(out, tuple) else (out,))])
            maps.square().mean().backward()
            found[device] = maps.detach().cpu(), network.encoder.vit.patch_embed.proj.weight.grad.clone().cpu()
        for ours, theirs in zip(found["cuda"], found["cpu"], strict=True):
            difference = (ours - theirs).norm() / theirs.norm()
            assert difference < (1e-4 if precision == "fp32" else 3e-2), (type(network).__name__, difference)


def on_gpu(name, *arguments):
    """A tool's whole run on the first GPU; its output where it fails."""
    done = tool(name, *arguments, CUDA_VISIBLE_DEVICES="0")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done


STEPS = {
    "num_workers": 0, "total_batch_size": 8, "default_hooks.logger.interval": 1,
    "default_hooks.checkpoint.interval": 1, "log_processor.window_size": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory):
    """A pretraining of two epochs in bf16, on the GPU."""
    folder = tmp_path_factory.mktemp("gpu") / "run"
    arguments = ["--data-root", scenes, "--work-dir", folder, *flags(PRETRAIN)]
    on_gpu("pretrain.sh", SCENES, 1, *arguments)
    return folder


PRETRAIN = {**STEPS, "train_cfg.max_epochs": 2, "param_scheduler.warmup": 0.5, "base_lr": 0.032}


@pytest.mark.parametrize("change", [{}, {"compile": True}, {"fsdp": True}], ids=["resumed", "compiled", "sharded"])
def test_a_run_resumes_compiles_and_shards(change, run, scenes, tmp_path):
    if change:
        on_gpu("pretrain.sh", SCENES, 1, "--data-root", scenes, "--work-dir", tmp_path, *flags(PRETRAIN | change))
        expected = losses(run)
    else:
        (tmp_path / "epoch_1.pth").write_bytes((run / "epoch_1.pth").read_bytes())
        (tmp_path / "latest.pth").symlink_to("epoch_1.pth")
        on_gpu("train.py", SCENES, "--work-dir", tmp_path, "--resume")
        expected = {step: loss for step, loss in losses(run).items() if step > 5}
    assert losses(tmp_path) == pytest.approx(expected, rel=2e-2)  # bf16, and sums in no fixed order
    assert losses(run)[10] < losses(run)[1]


def test_features_and_their_measures_are_those_of_a_cpu(run, labelled, tmp_path):
    for config in ("knn/vit_tiny_scenes.py", "linear/vit_tiny_scenes_fast.py"):
        found = []
        for device in ("", "0"):
            folder = tmp_path / f"{config[:3]}{device}"
            line = [f"semaim/configs/{config}", run / "latest.pth", "--data-root", labelled, "--work-dir", folder]
            done = tool("test.py", *line, CUDA_VISIBLE_DEVICES=device)
            assert done.returncode == 0, done.stderr
            found.append(results(folder)["metrics"])
        assert found[0].keys() == found[1].keys()
        for key, value in found[0].items():
            assert found[1][key] == pytest.approx(value, abs=10.01), key  # of ten images, one


def test_an_encoder_is_fine_tuned(run, labelled, tmp_path):
    options = flags({**STEPS, "train_cfg.max_epochs": 2, "param_scheduler.warmup": 0.5})
    line = ["semaim/configs/finetune/vit_tiny_scenes.py", "--pretrained", run / "latest.pth", "--data-root", labelled]
    on_gpu("train.py", *line, "--work-dir", tmp_path, *options)
    assert 0 <= results(tmp_path)["metrics"]["top1"] <= 100


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_dense_tasks_train_resume_are_measured_and_predict(task, run, tmp_path):
    package = "mmdet" if task == "detection" else "mmseg"
    pytest.importorskip(package, reason=f"{package} is not installed: runs after tools/setup.sh --extras all")
    from semaim.data.scenes import write_scenes

    config, kind = {
        "detection": ("mmdet_configs/semaim_mask_rcnn_scenes.py", "coco"),
        "segmentation": ("mmseg_configs/semaim_upernet_scenes.py", "ade"),
    }[task]
    write_scenes(tmp_path / "scenes", 24, 96, seed=0)
    data = tmp_path / "scenes" / kind
    options = {**STEPS, "train_cfg.max_iters": 6, "train_cfg.val_interval": 3, "default_hooks.checkpoint.interval": 3}
    places = ["--data-root", data, "--work-dir", tmp_path / "whole"]
    on_gpu("dist_train.sh", config, 1, *places, "--pretrained", run / "latest.pth", *flags(options))
    whole = losses(tmp_path / "whole")
    assert len(whole) == 6 and all(loss < 100 for loss in whole.values())
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "iter_3.pth").write_bytes((tmp_path / "whole" / "iter_3.pth").read_bytes())
    (parts / "latest.pth").symlink_to("iter_3.pth")
    on_gpu("train.py", config, "--work-dir", parts, "--resume")
    assert losses(parts) == pytest.approx({step: loss for step, loss in whole.items() if step > 3}, rel=0.1)
    trained, measured = tmp_path / "whole" / "latest.pth", []
    for device in ("", "0"):
        folder = tmp_path / f"test{device}"
        line = [config, trained, "--data-root", data, "--work-dir", folder]
        done = tool("test.py", *line, CUDA_VISIBLE_DEVICES=device)
        assert done.returncode == 0, done.stderr
        measured.append(results(folder)["metrics"])
    assert measured[1] == pytest.approx(measured[0], abs=1.0)
    images = sorted((tmp_path / "scenes" / "coco" / "val2017").iterdir())[:2]
    on_gpu("predict.py", config, trained, *images, "--out", tmp_path / "predicted")
    assert {path.stem for path in images} <= {path.stem for path in (tmp_path / "predicted").iterdir()}
