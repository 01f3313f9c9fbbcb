"""Where the centre of an order falls on built-in scenes, against counts over pixels and patches."""

import json
import math
import subprocess
import sys

import numpy as np
import oracle
import pytest
import torch
from commands import ROOT
from PIL import Image

from semaim.benchmarks.centres import measure, on_objects, scenes_of, similarities_of
from semaim.checkpoints.files import read_checkpoint
from semaim.data.folder import centre_crops
from semaim.data.scenes import LEVELS
from semaim.engine.pretraining import model_from_checkpoint
from semaim.errors import UserError


def covered(file, side, background):
    """Patches of side x side pixels of a map that objects cover by half or more, one by one."""
    classes = np.asarray(Image.open(file)).tolist()
    found = []
    for top in range(0, len(classes), side):
        for left in range(0, len(classes), side):
            pixels = [classes[y][x] for y in range(top, top + side) for x in range(left, left + side)]
            found.append(2 * sum(it not in (0, background) for it in pixels) >= side * side)
    return found


def run(*arguments):
    """The command as typed."""
    line = [sys.executable, "-m", "semaim.benchmarks.centres", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_patches_on_objects(scenes, tmp_path):
    folder = scenes.parent / "ade"
    background = len((folder / "objectInfo.txt").read_text().splitlines()) - 1
    files = sorted((folder / "annotations/validation").glob("*.png"))
    found = on_objects(files, (4, 4), background)
    assert found.tolist() == [covered(file, 8, background) for file in files] and 0 < found.float().mean() < 1
    # Exactly half is on it, unlabelled is not; a grid whose patches cut pixels takes parts of them.
    classes = np.zeros((8, 8), np.uint8)
    classes[:4, :2] = 1
    classes[4:, 4:] = 2
    Image.fromarray(classes).save(tmp_path / "map.png")
    assert on_objects([tmp_path / "map.png"], (2, 2), 2).tolist() == [[True, False, False, False]]
    classes[:] = 3
    Image.fromarray(classes).save(tmp_path / "map.png")
    assert on_objects([tmp_path / "map.png"], (3, 3), 4).all()


def test_figures_of_maps_counted_by_hand():
    objects = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]]).bool()
    maps = torch.tensor(
        [[0.4, 0.3, 0.2, 0.1], [0.7, 0.1, 0.1001, 0.0999], [0.1, 0.2, 0.3, 0.4], [0.25, 0.26, 0.24, 0.25]]
    )
    found = measure(maps, objects)
    # Centres 0, 0, 3, 1: on, off, on, off. Patches on objects 2 + 2 + 3 + 0; the second one is in three of four.
    assert (found["images"], found["on_object"], found["chance"], found["places"]) == (4, 0.5, 7 / 16, 3)
    assert (found["best_fixed"], found["best_place"]) == (0.75, 1)
    # Ranks over 3: (3 + 2) / 2 - (1 + 0) / 2 = 2; (1 + 0) / 2 - (3 + 2) / 2 = -2; (1 + 2 + 3) / 3 - 0 = 2.
    assert found["rank_difference"] == pytest.approx((2 - 2 + 2) / 3 / 3)
    entropies = [-sum(p * math.log(p, 4) for p in row) for row in maps.double().tolist()]
    assert found["entropy"] == pytest.approx(sum(entropies) / 4, abs=1e-6)
    assert measure(torch.full((1, 9), 1 / 9), torch.ones(1, 9).bool())["entropy"] == pytest.approx(1)
    assert measure(torch.rand(2, 9), torch.ones(2, 9).bool())["rank_difference"] is None


def test_the_command(pretrained, scenes, tmp_path):
    done = run(pretrained, "--scenes", scenes.parent, "--random", "--out", tmp_path / "new/c.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "new/c.json").read_text())["rows"]
    assert [(row["checkpoint"], row["similarity"], row["used"]) for row in rows] == [
        (checkpoint, similarity, similarity == "cls")
        for checkpoint in (None, str(pretrained))
        for similarity in ("cls", "gap", "self")
    ]
    lines = done.stdout.splitlines()
    assert "of 10 scenes" in lines[0] and len(lines) == 7 and lines[4].count("cls (used)") == 1

    images = sorted((scenes.parent / "coco/val2017").glob("*.jpg"))
    model = model_from_checkpoint(read_checkpoint(pretrained))
    seen = model.data_preprocessor.normalise(centre_crops(list(map(str, images)), 32))
    with torch.no_grad():
        tokens, _ = oracle.tokens(seen, dict(model.network.named_parameters()), patch=(8, 8), depth=2, heads=2)
    similarity = oracle.similarity(tokens)
    background = len((scenes.parent / "ade/objectInfo.txt").read_text().splitlines()) - 1
    maps = [scenes.parent / "ade/annotations/validation" / f"{image.stem}.png" for image in images]
    objects = [covered(file, 8, background) for file in maps]
    centres = similarity.argmax(-1).tolist()
    assert rows[3]["on_object"] == pytest.approx(sum(row[c] for row, c in zip(objects, centres, strict=True)) / 10)
    assert rows[3]["chance"] == pytest.approx(sum(map(sum, objects)) / 160)
    assert rows[3]["best_fixed"] == pytest.approx(max(map(sum, zip(*objects, strict=True))) / 10)
    assert (rows[3]["places"], rows[3]["images"]) == (len(set(centres)), 10)
    assert rows[0]["entropy"] != rows[3]["entropy"] and rows[0]["chance"] == rows[3]["chance"]


def test_the_model_stays_as_it_is_and_what_cannot_be_measured_is_told(pretrained, scenes, tmp_path):
    model = model_from_checkpoint(read_checkpoint(pretrained), {"model.network.similarity": "gap"})
    found = similarities_of(model, torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert list(found) == ["gap", "cls", "self"] and model.network.similarity == "gap"
    assert {tuple(similarity.shape) for similarity in found.values()} == {(1, 16)}
    with pytest.raises(UserError, match="holds no built-in scenes"):
        scenes_of(tmp_path, 5)
    with pytest.raises(UserError, match="--count 0"):
        scenes_of(scenes.parent, 0)
    images, maps, background = scenes_of(scenes.parent, 3)
    assert [path.stem for path in images] == [path.stem for path in maps] == ["000001", "000005", "000010"]
    assert background == len(LEVELS["normal"].classes) + 1 == max(np.asarray(Image.open(maps[0])).max(), 2)
