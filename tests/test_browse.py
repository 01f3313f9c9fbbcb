"""`semaim browse` on class folders and on images without labels: the pictures are what the model gets."""

import numpy as np
import pytest
from commands import one_line, tool
from mmengine.registry import DATASETS
from PIL import Image

import semaim.tasks  # noqa: F401  registers the types of configs
from semaim.engine.config import load_config

PRETRAIN = "semaim/configs/pretrain/semaim_vit_tiny_scenes.py"
FINETUNE = "semaim/configs/finetune/vit_tiny_scenes.py"
KNN = "semaim/configs/knn/vit_tiny_scenes.py"


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Class folders of three images of smooth colours in each of two classes and splits."""
    folder, random = tmp_path_factory.mktemp("browse"), np.random.default_rng(0)
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (folder / place).mkdir(parents=True)
        for number in range(3):
            small = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            small.resize((96, 72), Image.Resampling.BICUBIC).save(folder / place / f"{number}.png")
    return folder


def expected(config, classes):
    """The first training image by the data set itself, uint8 (S, S, 3)."""
    cfg = load_config(config)
    network = cfg.model.network
    more = {"patch_size": network.patch_size} if config == PRETRAIN else {"split": "train"}
    images = DATASETS.build({**cfg.dataset, "root": str(classes), "img_size": network.img_size, "seed": 0, **more})
    pixels = images[0, 0]["image"].numpy()
    if config == PRETRAIN:
        return pixels.transpose(1, 2, 0)
    # ImageNet's, by which the config normalises.
    mean, std = (np.array(values).reshape(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return np.clip(np.rint((pixels * std + mean) * 255), 0, 255).astype(np.uint8).transpose(1, 2, 0)


@pytest.mark.parametrize("config", [PRETRAIN, FINETUNE, KNN])
def test_pictures_are_what_the_model_gets(classes, tmp_path, config):
    done = tool("browse.py", config, "--data-root", classes, "--images", 3, "--out", tmp_path / "seen.png")
    assert done.returncode == 0, done.stderr
    assert f"wrote {tmp_path / 'seen.png'}: 3 of " in done.stdout
    first = expected(config, classes)
    scale = -(-480 // len(first))
    large = first.repeat(scale, axis=0).repeat(scale, axis=1)
    picture = np.asarray(Image.open(tmp_path / "seen.png").convert("RGB"))
    gap = next(x for x in range(40) if (picture[x, x] != 255).any())
    cell = picture[gap : gap + len(large), gap : gap + len(large)]
    assert np.abs(cell.astype(int) - large).max() <= 1, "colours round once"


def test_a_config_for_any_encoder_asks_for_one(classes, tmp_path):
    out = ["--data-root", classes, "--out", tmp_path / "seen.png"]
    one_line(tool("browse.py", "semaim/configs/finetune/plain_vit_small.py", *out), "for any encoder: name one")
    one_line(tool("browse.py", PRETRAIN, "--data-root", classes / "none", *out[2:]), "none")
    assert not (tmp_path / "seen.png").exists()
