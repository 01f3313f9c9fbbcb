"""The examples of CONTRIBUTING.md, run as they stand there."""

import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from commands import one_line, results, tool
from documented import listed, steps
from PIL import Image

import semaim.results
from semaim.checkpoints.files import read_checkpoint
from semaim.models import PixelTarget, SemAIM, ordering
from semaim.models.ordering import ORDERS, make_order
from semaim.results import load_published

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def blocks(heading: str, language: str) -> list[str]:
    """The code of a section."""
    section = TEXT.split(f"### {heading}\n")[1].split("\n### ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", section, re.M | re.S)


def test_an_order(monkeypatch):
    (code,) = blocks("An order", "python")
    names = set(ORDERS)
    monkeypatch.setattr(ordering, "ORDERS", ORDERS.copy())
    exec(compile(code, "CONTRIBUTING.md", "exec"), {})
    assert set(ordering.ORDERS) - names == {"columns"}
    # 2 rows of 3: patches 0 1 2 / 3 4 5.
    order = make_order("columns", None, (2, 3), torch.rand(4, 6))
    assert order.tolist() == [[0, 3, 1, 4, 2, 5]] * 4
    sizes = {"img_size": (8, 12), "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1}
    model = SemAIM(PixelTarget((4, 4)), "columns", **sizes)
    out = model(torch.randn(2, 3, 8, 12))
    out.loss.backward()
    assert out.order.tolist() == [[0, 3, 1, 4, 2, 5]] * 2 and model.cls_token.grad.abs().sum() > 0


def test_every_command_is_listed():
    """Only the Python and YAML here are run; docs/own_data.md and docs/predict.md are typed by their own tests."""
    assert [step.name for step in steps("CONTRIBUTING.md") if not step.python and not listed().reason(step)] == []


def test_orders_are_as_before():
    assert "columns" not in ORDERS


@pytest.mark.skipif(
    find_spec("mmseg") is None, reason="mmsegmentation is not installed: runs after tools/setup.sh --extras all"
)
def test_a_data_set(tmp_path, monkeypatch):
    from mmengine.registry import DATASETS, MODELS

    from semaim.engine.config import load_config
    from semaim.engine.dense import enter

    (code,) = blocks("A data set", "python")
    (name,) = re.findall(r"`mmseg_configs/(semaim_upernet_\w+\.py)` is:", TEXT)
    for folder in ("mmseg_configs", "semaim/configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "mmseg_configs" / name).write_text(code)
    for split in ("training", "validation"):
        for kind, picture in (
            ("images", np.zeros((40, 60, 3), np.uint8)),
            ("annotations", np.ones((40, 60), np.uint8)),
        ):
            folder = tmp_path / "data/roads" / kind / split
            folder.mkdir(parents=True)
            Image.fromarray(picture).save(folder / ("1.jpg" if kind == "images" else "1.png"))
    monkeypatch.chdir(tmp_path)  # data/roads is found from here
    cfg = load_config(tmp_path / "mmseg_configs" / name)
    enter(cfg)
    for given in (cfg.train_dataset, cfg.val_dataset):
        data = DATASETS.build(given)
        assert len(data) == 1 and list(data.metainfo["classes"]) == ["road", "rest"]
        labels = data[0]["data_samples"].gt_sem_seg.data
        assert labels.unique().tolist() in ([0], [0, 255])  # road; 255 is the padding of a crop
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    assert model.decode_head.num_classes == model.auxiliary_head.num_classes == 2
    assert model.decode_head.conv_seg.out_channels == 2


@pytest.fixture
def own(tmp_path):
    """Runs a tool with a section's module, and its config beside the suite's."""
    shutil.copytree(ROOT / "semaim/configs", tmp_path / "configs")

    def run(heading, folder, name, *words):
        module, config = blocks(heading, "python")
        (tmp_path / "mine.py").write_text(module)
        file = tmp_path / f"configs/{folder}/mine.py"
        file.write_text(f'{config}\ncustom_imports = dict(imports=["mine"])\n')
        done = tool(name, file, *words, PYTHONPATH=f"{ROOT}:{tmp_path}")
        assert done.returncode == 0, done.stderr
        return done

    return run


def test_an_encoder(labelled, tmp_path):
    shutil.copytree(ROOT / "semaim/configs", tmp_path / "configs")
    pretrain, knn = (tmp_path / f"configs/{folder}/slim.py" for folder in ("pretrain", "knn"))
    for file, code in zip((pretrain, knn), blocks("An encoder", "python")[:2], strict=True):
        file.write_text(code)
    places, small = ["--data-root", labelled], ["--cfg-options", "model.network.img_size=32", "num_workers=0"]
    few = ["total_batch_size=8", "train_cfg.max_epochs=1"]
    done = tool("train.py", pretrain, *places, "--work-dir", tmp_path / "run", *small, *few)
    assert done.returncode == 0, done.stderr
    weights = tmp_path / "run/latest.pth"
    assert tuple(read_checkpoint(weights)["model"]["patch_embed.proj.weight"].shape) == (96, 3, 16, 16)
    done = tool("test.py", knn, weights, *places, "--work-dir", tmp_path / "knn", *small)
    assert done.returncode == 0 and results(tmp_path / "knn")["metrics"], done.stderr
    other = [tmp_path / "configs/knn/vit_tiny_scenes.py", weights, *places, "--work-dir", tmp_path / "out"]
    one_line(tool("test.py", *other), "the model a ViT")


def test_a_family_of_encoders(labelled, tmp_path):
    (tmp_path / "my_encoder.py").write_text(blocks("An encoder", "python")[2])
    config = tmp_path / "mine.py"
    base = ROOT / "semaim/configs/knn/plain_vit.py"
    config.write_text(f'_base_ = "{base}"\ncustom_imports = dict(imports=["my_encoder"])\n')
    weights = {"patch_embed.proj.weight": torch.randn(64, 3, 16, 16), "patch_embed.proj.bias": torch.zeros(64)}
    weights |= {"norm.weight": torch.ones(64), "norm.bias": torch.zeros(64)}
    torch.save(weights, tmp_path / "weights.pth")
    path = {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    options = ["model.network.pool=avg", "model.network.img_size=32", "num_workers=0", "evaluation.ks=[5]"]
    stated = ["dataset.mean=[.5,.5,.5]", "dataset.std=[.5,.5,.5]"]
    line = [config, tmp_path / "weights.pth", "--arch", "only_patches", "--data-root", labelled]
    done = tool("test.py", *line, "--work-dir", tmp_path / "run", "--cfg-options", *options, *stated, **path)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "run")["backbone"] == "only_patches"
    one_line(tool("test.py", *line, "--work-dir", tmp_path / "b", "--cfg-options", *options, **path), "not known")
    del weights["norm.bias"]
    torch.save(weights, tmp_path / "weights.pth")
    done = tool("test.py", *line, "--work-dir", tmp_path / "c", "--cfg-options", *options, *stated, **path)
    one_line(done, "lacks ['norm.bias']")


def test_a_pretraining_method(own, labelled, tmp_path):
    words = ["--data-root", labelled / "train", "--work-dir", tmp_path / "run"]
    small = ["total_batch_size=8", "num_workers=0", "train_cfg.max_epochs=1", "model.network.depth=2"]
    done = own("A pretraining method", "pretrain", "train.py", *words, "--cfg-options", *small)
    assert "Copy: target PixelTarget" in done.stdout + done.stderr
    assert read_checkpoint(tmp_path / "run/latest.pth")["config"]["origin"]["method"] == "Copy"


def test_a_task(own, labelled, tmp_path):
    words = ["random", "--data-root", labelled, "--work-dir", tmp_path / "run"]
    own("A task", "knn", "test.py", *words, "--cfg-options", "num_workers=0")
    found = results(tmp_path / "run")
    assert found["task"] == "hubs of neighbours" and 0 <= found["metrics"]["hubs"] <= 100
    table = tool("results_table.py", tmp_path / "run", "--format", "csv")
    assert table.returncode == 0 and "shared neighbours" in table.stdout, table.stderr


def test_a_published_figure(tmp_path, monkeypatch):
    source, figure = blocks("A published figure", "yaml")
    text = (ROOT / "semaim/results/published.yaml").read_text()
    before = load_published()
    text = text.replace("\nsources:\n", f"\nsources:\n{source}", 1)
    head, group = text.split("  - task: fine-tuning\n    data: ", 1)
    group = group.replace("    figures:\n", f"    figures:\n{figure}", 1)
    (tmp_path / "published.yaml").write_text(f"{head}  - task: fine-tuning\n    data: {group}")
    monkeypatch.setattr(semaim.results, "__file__", str(tmp_path / "__init__.py"))
    (new,) = [it for it in load_published().figures if it not in before.figures]
    assert (new.method, new.task, new.metric, new.value, new.status) == (
        "Example",
        "fine-tuning",
        "top-1",
        83.0,
        "read",
    )
    assert new.source == next(iter(yaml.safe_load(source).values()))


def test_the_files_that_are_named_are_there():
    named = set(re.findall(r"`((?:tools|tests|semaim|mmdet_configs|mmseg_configs|docs)/[\w./]+)`", TEXT))
    named |= set(re.findall(r"\]\(([\w./]+)\)", TEXT))
    examples = {
        "mmseg_configs/semaim_upernet_roads.py",
        "semaim/configs/knn/hubs_vit_tiny_cifar10.py",
        "semaim/configs/knn/vit_slim_scenes.py",
        "semaim/configs/pretrain/semaim_vit_slim_scenes.py",
    }
    missing = [name for name in named if not (ROOT / name).exists() and name not in examples]
    assert len(named) > 8 and not missing
