"""The command-line tools, run for real, and the pictures they make."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import one_line, tool
from PIL import Image
from safetensors.torch import load_file, save_file

from semaim.drawing.encoder import draw_orders, reconstruct
from semaim.engine.pretraining import model_from_checkpoint
from semaim.engine.training import train
from semaim.models.vit import patchify

ROOT = Path(__file__).resolve().parent.parent
DETECTORS = pytest.mark.skipif(not find_spec("mmdet"), reason="no mmdet: runs after tools/setup.sh --extras all")


@pytest.mark.parametrize("name", [path.name for path in sorted((ROOT / "tools").glob("*.*"))])
def test_every_tool_has_help(name):
    script = ROOT / "tools" / name
    if name == "test.sh":
        return  # its arguments are pytest's
    start = [sys.executable] if name.endswith(".py") else ["bash"]
    done = subprocess.run([*start, script, "--help"], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0 and "usage" in done.stdout.lower(), done.stderr


def test_a_closed_pipe_ends_a_tool_quietly():
    line = [sys.executable, "tools/reproduce.py", "--scale", "paper", "--dry-run"]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, cwd=ROOT, **pipe) as child:
        child.stdout.close()
        assert (child.wait(120), child.stderr.read()) == (141, "")


# Parity with the recorded reference.


def test_every_recorded_case_passes(shared):
    done = tool("check_parity.py", shared / "golden")
    assert done.returncode == 0, done.stdout
    assert " passed, 0 failed" in done.stdout and "deviation: nested boxes" in done.stdout
    semaim = ("pixel", "pixel_l1_qd2_linear", "feature", "feature_clip", "orders", "ema", "share_weight")
    semaim += ("clip_tower", "large_decoder")
    detection, segmentation = ("lr_decay", "plain", "relpos"), ("mae_resized", "tta_sizes", "upernet_keys")
    cases = ["mae/mae", *(f"semaim/{name}" for name in semaim), *(f"vitdet/{name}" for name in detection)]
    cases += [f"mmseg/{name}" for name in segmentation]
    if find_spec("mmdet"):
        cases += [f"detector/{name}_{what}" for name in ("mask_rcnn", "cascade") for what in ("test", "train")]
    for case in cases:
        line = next(line for line in done.stdout.splitlines() if line.startswith(f"{case} "))
        assert line.endswith("  pass")


@pytest.mark.parametrize(
    ("case", "name", "change"),
    [
        ("semaim/pixel", "loss_map", lambda t: t + 1e-4),
        ("semaim/pixel", "grad.query_blocks.3.attn.q.bias", lambda t: t.flip(0)),
        ("semaim/pixel", "param.blocks.1.norm2.bias", lambda t: t + 1e-3),
        ("semaim/feature", "teacher_tokens", lambda t: t.roll(1, 1)),
        ("semaim/clip_tower", "teacher.visual.ln_post.bias", lambda t: t + 1e-3),
        ("semaim/orders", "key.attention_center", lambda t: t.flip(-1)),
        ("semaim/orders", "box_count_by_centre", lambda t: t.roll(1, 0)),
        ("semaim/ema", "update.average_after", lambda t: t + 1e-5),
        ("mae/mae", "latent", lambda t: t.roll(1, 1)),
        ("mae/mae", "ids_restore", lambda t: t.flip(0)),
        ("mae/mae", "ratio_0.6.loss.raw_pix", lambda t: t + 1e-4),
        ("mae/mae", "grad.norm_pix.mask_token", lambda t: t * 1.001),
        ("mae/mae", "param.decoder_pos_embed", lambda t: t.roll(1, 1)),
        ("mae/mae", "param.decoder_norm.bias", lambda t: t + 1e-3),
        ("vitdet/relpos", "wide.p6", lambda t: t.roll(1, -1)),
        ("vitdet/relpos", "square.grad.net.blocks.0.attn.rel_pos_h", lambda t: t.flip(0)),
        ("vitdet/plain", "param.simfp_2.1.bias", lambda t: t + 1e-3),
        pytest.param("detector/cascade_test", "0.stage2.boxes", lambda t: t + 0.01, marks=DETECTORS),
        pytest.param("detector/cascade_train", "rpn.match_label", lambda t: t.roll(1, 1), marks=DETECTORS),
        ("mmseg/mae_resized", "pretrain.pos_embed", lambda t: t.roll(1, 1)),
        ("mmseg/mae_resized", "grad.layers.1.gamma_2", lambda t: t * 1.001),
    ],
)
def test_a_changed_record_fails(shared, tmp_path, case, name, change):
    """The tool sees differences: each of these must turn its case from pass to fail."""
    family = (tmp_path / case).parent
    family.mkdir()
    shutil.copy(shared / "golden/images.safetensors", tmp_path)
    shutil.copy(shared / f"golden/{case}.json", family)
    tensors = load_file(shared / f"golden/{case}.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, tmp_path / f"{case}.safetensors")
    done = tool("check_parity.py", family)
    assert done.returncode == 1 and "0 passed, 1 failed" in done.stdout, done.stdout


def test_tied_keys_are_listed_and_the_rest_is_compared(shared, tmp_path):
    tensors = load_file(shared / "golden/semaim/pixel.safetensors")
    key = tensors["order_key"]
    order = key[1].argsort()
    key[1, order[5]] = key[1, order[6]]
    (tmp_path / "semaim").mkdir()
    save_file(tensors, tmp_path / "semaim/pixel.safetensors")
    shutil.copy(shared / "golden/semaim/pixel.json", tmp_path / "semaim")
    shutil.copy(shared / "golden/images.safetensors", tmp_path)
    done = tool("check_parity.py", tmp_path, "--verbose")
    assert done.returncode == 0 and "deviation: images [1] have patches with equal keys" in done.stdout, done.stdout
    assert "query_stream.3" in done.stdout and "loss_fp64" not in done.stdout


def test_parity_of_what_is_no_case(tmp_path):
    one_line(tool("check_parity.py", tmp_path / "nowhere"), "no such folder")
    one_line(tool("check_parity.py", tmp_path), "no recorded cases in")
    (tmp_path / "broken.json").write_text("{")
    one_line(tool("check_parity.py", tmp_path), "broken.json")
    (tmp_path / "broken.json").write_text(json.dumps({"case": "semaim/x", "status": "ok"}))
    one_line(tool("check_parity.py", tmp_path), "no recorded case")


# Pictures.


def test_order_and_curve_pictures(tiny_config, scenes, tmp_path):
    cfg = tiny_config()
    train(cfg)
    checkpoint = Path(cfg.work_dir) / "latest.pth"
    images = sorted((scenes / "val").rglob("*.jpg"))[:2]
    done = tool("visualize.py", "order", checkpoint, *images, "--out", tmp_path / "new/orders.png")
    assert done.returncode == 0, done.stderr
    shown = np.asarray(Image.open(tmp_path / "new/orders.png"))
    assert shown.ndim == 3 and len(np.unique(shown.reshape(-1, 3), axis=0)) > 50
    done = tool("visualize.py", "curve", cfg.work_dir, "--out", tmp_path / "curve.png")
    assert done.returncode == 0 and Image.open(tmp_path / "curve.png").size == (700, 400)

    out = tmp_path / "x.png"
    one_line(
        tool("visualize.py", "order", ROOT / "setup.py", images[0], "--out", out), "setup.py: broken or no checkpoint"
    )
    one_line(tool("visualize.py", "order", checkpoint, tmp_path / "no.jpg", "--out", out), "no.jpg: no such file")
    one_line(tool("visualize.py", "curve", tmp_path, "--out", tmp_path / "x.txt"), "name a .png")
    assert not out.exists()


@pytest.mark.parametrize("target", ["PixelTarget", "FeatureTarget"])
def test_pictures_show_what_there_is(target):
    network = {
        "type": "SemAIM", "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2,
        "order": "semantic" if target == "PixelTarget" else "raster", "target": {"type": target},
    }  # fmt: skip
    config = {"model": {"type": "Pretraining", "network": network}}
    weights = build(network).state_dict()
    model = model_from_checkpoint({"config": config, "model": weights})
    model.network.train()
    images = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    picture = draw_orders(model, images)
    assert model.network.training, "drawing must not leave the network in another mode"
    # Four columns with pixels; with features there is nothing to rebuild, but a similarity map.
    assert picture.width == (640 if target == "PixelTarget" else 480)
    # Turned: a row for each of them, with its name beside it, and the same first cell.
    across = draw_orders(model, images, across=True)
    assert across.width == 350 and across.height == (670 if target == "PixelTarget" else 510)


def build(network):
    """The network of a config."""
    from semaim.engine.pretraining import build_network

    return build_network(network)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_perfect_prediction_rebuilds_the_image(norm_pix):
    target = {"type": "PixelTarget", "blur_kernel": 0, "norm_pix": norm_pix}
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    network = build({"type": "SemAIM", **size, "target": target})
    images = torch.randn(2, 3, 32, 48)
    prediction = network.target.prepare(images)
    assert prediction.shape == patchify(images, (8, 8)).shape
    torch.testing.assert_close(reconstruct(network, images, prediction), images, atol=1e-4, rtol=0)
