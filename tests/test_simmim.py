"""SimMIM: its mask and loss against the paper's words, written out, and its way through the tools."""

import math

import numpy as np
import pytest
import torch
from commands import ROOT, results, tool
from hypothesis import given
from hypothesis import strategies as st

from semaim.checkpoints.files import read_checkpoint
from semaim.engine.pretraining import build_network, model_from_checkpoint
from semaim.registry import method_of, variants

SMALL = {"type": "SimMIM", "size": "tiny", "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 4}
TARGET = {"type": "PixelTarget", "blur_kernel": 0, "norm_pix": False, "loss": "l1"}


def network(**changed):
    torch.manual_seed(0)
    return build_network({**SMALL, "mask_size": 8, "target": TARGET, **changed}).eval()


@given(seed=st.integers(0, 10_000), ratio=st.sampled_from([0.1, 0.5, 0.6, 0.9]))
def test_whole_squares_are_masked_and_as_many_as_the_paper_says(seed, ratio):
    draw = torch.rand(3, 64, generator=torch.Generator().manual_seed(seed))
    mask = network(mask_ratio=ratio).mask(draw, (8, 8)).view(3, 8, 8)
    squares = mask[:, ::2, ::2]
    assert torch.equal(mask, squares.repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert (squares.flatten(1).sum(1) == math.ceil(16 * ratio)).all()
    chosen = draw.view(3, 8, 8)[:, ::2, ::2]
    for one, numbers in zip(squares, chosen, strict=True):
        assert numbers[one == 1].max() < numbers[one == 0].min()


def test_the_loss_is_the_mean_absolute_difference_of_masked_pixels():
    net = network()
    images, draw = torch.randn(2, 3, 32, 32), torch.rand(2, 64)
    output = net(images, draw)
    wrong, count = 0.0, 0
    for image, predicted, masked in zip(images, output.prediction, output.mask, strict=True):
        for index in np.flatnonzero(masked):
            row, column = 4 * (index // 8), 4 * (index % 8)
            square = image[:, row : row + 4, column : column + 4].permute(1, 2, 0).reshape(-1)
            wrong, count = wrong + (square - predicted[index]).abs().sum(), count + square.numel()
    assert output.loss.item() == pytest.approx((wrong / count).item(), rel=1e-5)


def test_the_encoder_sees_nothing_of_masked_patches():
    net = network()
    images, draw = torch.randn(1, 3, 32, 32), torch.rand(1, 64)
    output = net(images, draw)
    mask = output.mask.view(1, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = torch.where(mask.bool(), torch.randn_like(images), images)
    assert torch.equal(net(other, draw).prediction, output.prediction)
    assert not torch.equal(net(torch.where(mask.bool(), images, other + 1), draw).prediction, output.prediction)


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"mask_ratio": 1.0}, "mask_ratio"), ({"mask_size": 6}, "whole patches"), ({"mask_size": 24}, "whole squares")],
)
def test_impossible_masks_are_refused(changed, message):
    from semaim.errors import UserError

    with pytest.raises(UserError, match=message):
        network(**changed)


def test_it_is_pretrained_drawn_and_measured_by_the_tools(labelled, tmp_path):
    config = "semaim/configs/pretrain/simmim_vit_tiny_cifar10.py"
    small = ["model.network.embed_dim=32", "model.network.num_heads=2", "model.network.depth=2"]
    train = [*small, "total_batch_size=8", "num_workers=0", "train_cfg.max_epochs=2"]
    run = tmp_path / "run"
    done = tool("train.py", config, "--data-root", labelled / "train", "--work-dir", run, "--cfg-options", *train)
    assert done.returncode == 0, done.stderr
    assert "SimMIM: mask ratio 0.6 in squares of 8 x 8 px; target PixelTarget" in done.stderr + done.stdout
    assert (run / "reconstructions/epoch_0002.png").is_file()
    picture = tmp_path / "seen.png"
    images = sorted(labelled.glob("val/*/*.jpg"))[:2]
    done = tool("visualize.py", "reconstruction", run / "latest.pth", *images, "--out", picture)
    assert done.returncode == 0 and picture.is_file(), done.stderr
    line = ["semaim/configs/knn/vit_tiny_cifar10.py", run / "latest.pth", "--data-root", labelled]
    done = tool("test.py", *line, "--work-dir", tmp_path / "knn", "--cfg-options", *small, "evaluation.ks=(5,)")
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "knn")["method"] == "SimMIM"
    done = tool("results_table.py", tmp_path / "knn", "--format", "md")
    assert "| SimMIM |" in done.stdout, done.stdout
    model = model_from_checkpoint(read_checkpoint(run / "latest.pth"))
    assert type(model.network).__name__ == "SimMIM" and "mask_token" in model.network.state_dict()


def test_reproduce_knows_it(tmp_path):
    method, variant = variants()["simmim"]
    assert method is method_of({"type": "SimMIM"}) and not variant.compared
    line = ["--scale", "quick", "--methods", "simmim", "--only", "pretrain", "knn", "--dry-run"]
    done = tool("reproduce.py", *line, "--work-dir", tmp_path / "work")
    assert done.returncode == 0 and "simmim_vit_tiny_scenes_easy.py" in done.stdout, done.stderr
    assert (ROOT / variant.configs["pretrain"]["paper"]).is_file()
