"""How often bf16 moves the centre of an order: the tool that measures it."""

import subprocess
import sys

import oracle
import pytest
import torch
from commands import ROOT

from semaim.benchmarks.look import centres, compare
from semaim.checkpoints.files import read_checkpoint
from semaim.data.folder import centre_crops, find_images
from semaim.engine.pretraining import model_from_checkpoint
from semaim.errors import UserError


def test_moved_centres_are_counted(pretrained, scenes):
    model = model_from_checkpoint(read_checkpoint(pretrained))
    network, images = model.network, centre_crops(find_images(scenes), 32)
    seen = model.data_preprocessor.normalise(images)
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        tokens, _ = oracle.tokens(seen, parameters, patch=(8, 8), depth=2, heads=2)
    right = oracle.similarity(tokens).argmax(-1)
    assert torch.equal(centres(network, seen, low=False), right)

    found = compare(model, images, batch=16)
    for (share, distance), (low, similarity_low) in zip(found.values(), ((True, False), (True, True)), strict=True):
        moves = [
            ((a // 4 - b // 4) ** 2 + (a % 4 - b % 4) ** 2) ** 0.5
            for part, whole in zip(seen.split(16), right.split(16), strict=True)
            for a, b in zip(centres(network, part, low, similarity_low).tolist(), whole.tolist(), strict=True)
            if a != b
        ]
        assert share == pytest.approx(len(moves) / len(images))
        assert distance == pytest.approx(sum(moves) / len(moves) if moves else 0)
    assert found["pass and similarity in bf16"][0] > 0


def test_a_run_that_looks_in_fp32_has_nothing_to_compare(pretrained, scenes):
    model = model_from_checkpoint(read_checkpoint(pretrained), {"model.network.look_precision": "fp32"})
    with pytest.raises(UserError, match="nothing to compare"):
        compare(model, torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_the_command(pretrained, scenes):
    line = [sys.executable, "-m", "semaim.benchmarks.look", str(pretrained), "--images", str(scenes), "--count", "8"]
    done = subprocess.run([*line, "--random"], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()
    assert "of 8 images" in rows[0] and [row.split()[0] for row in rows[1:]].count("random") == 2 and len(rows) == 5
