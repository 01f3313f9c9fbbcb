"""A method and a task of one's own, in a folder outside of the suite, reach every tool through a config."""

import importlib
import sys

import pytest
from commands import ROOT, one_line, results, tool

from semaim.registry import TASKS, Method, Task, methods, task_of, task_titled, tasks, variants

METHOD = '''
"""A toy: every patch is predicted from the class token and its place."""
from typing import NamedTuple

import torch
from torch import Tensor, nn

from semaim.engine.pretraining import build_target
from semaim.models import VisionTransformer
from semaim.registry import METHODS, Method, Variant


class Output(NamedTuple):
    loss: Tensor
    prediction: Tensor
    target: Tensor
    mask: Tensor


class Guess(VisionTransformer):
    def __init__(self, target, share: float = 0.5, **encoder):
        super().__init__(**encoder)
        self.target, self.share = target, share
        self.prediction_head = nn.Linear(self.embed_dim, target.width)
        self.reset_parameters()

    def forward(self, images, draw=None):
        tokens = super().forward(images)
        prediction = self.prediction_head(tokens[:, :1] + tokens[:, 1:])
        target = self.target.prepare(images)
        mask = (draw < self.share).float()
        loss = (self.target.loss(prediction, target) * mask).sum() / mask.sum().clamp(min=1)
        return Output(loss, prediction, target, mask)


@METHODS.register_module(name="Guess")
class GuessMethod(Method):
    network = Guess
    variants = {"guess": Variant({"pretrain": {"study": "CONFIG"}})}

    @classmethod
    def build(cls, target, **arguments):
        return Guess(build_target(target, arguments.get("patch_size", 16)), **arguments)
'''
TASK = '''
"""A toy: how far the right class is from the best, of a classifier."""
from mmengine.registry import METRICS

from semaim.engine.classification import ClassAccuracy
from semaim.engine.images import ImageTask
from semaim.registry import TASKS, Metric


@METRICS.register_module()
class Shortfall(ClassAccuracy):
    def compute_metrics(self, results):
        found = super().compute_metrics(results)
        return {"shortfall": 100 - found["top1"]}


@TASKS.register_module()
class ShortfallTask(ImageTask):
    name = "shortfall"
    title = "shortfall"
    metrics = {"shortfall": Metric("shortfall of top-1", "shortfall", higher_is_better=False)}

    def validation(self, cfg, run, mode):
        return {**super().validation(cfg, run, mode), f"{mode}_evaluator": {"type": "Shortfall"}}

    def trained_figures(self, cfg, runner):
        hub = runner.message_hub
        return {"shortfall": hub.get_scalar("val/shortfall").current()}, {"epochs": runner.epoch}
'''
PRETRAIN = """
_base_ = "{configs}/pretrain/mae_vit_tiny_cifar10.py"
custom_imports = dict(imports=["mine.guess"])
model = dict(
    network=dict(
        _delete_=True,
        type="Guess",
        size="tiny",
        embed_dim=32,
        depth=2,
        num_heads=2,
        img_size=32,
        patch_size=8,
        share=0.7,
        target=dict(type="PixelTarget", blur_kernel=0),
    )
)
total_batch_size = 8
num_workers = 0
train_cfg = dict(max_epochs=2)
default_hooks = dict(pictures=dict(_delete_=True, type="OrderPictures", interval=2))
"""
MEASURE = """
_base_ = "{configs}/finetune/vit_tiny_cifar10.py"
custom_imports = dict(imports=["mine.shortfall"])
task = "shortfall"
model = dict(network=dict(embed_dim=32, depth=2, num_heads=2, patch_size=8))
total_batch_size = 8
num_workers = 0
train_cfg = dict(max_epochs=2)
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A folder with a package of one's own, and configs that name its modules."""
    folder = tmp_path_factory.mktemp("own")
    package = folder / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "guess.py").write_text(METHOD.replace("CONFIG", str(folder / "pretrain.py")))
    (package / "shortfall.py").write_text(TASK)
    (folder / "pretrain.py").write_text(PRETRAIN.format(configs=ROOT / "semaim/configs"))
    (folder / "measure.py").write_text(MEASURE.format(configs=ROOT / "semaim/configs"))
    return folder


def run(mine, name, *arguments):
    """A tool with the folder on the path that Python imports from."""
    return tool(name, *arguments, PYTHONPATH=f"{ROOT}:{mine}")


@pytest.mark.slow
def test_a_method_and_a_task_of_ones_own_go_through_every_tool(mine, labelled, tmp_path):
    work = tmp_path / "guess"
    done = run(mine, "train.py", mine / "pretrain.py", "--data-root", labelled / "train", "--work-dir", work)
    assert done.returncode == 0 and "Guess: target PixelTarget" in done.stdout + done.stderr, done.stderr
    assert (work / "reconstructions/epoch_0002.png").is_file()

    config, data = mine / "measure.py", ["--data-root", labelled]
    done = run(
        mine, "train.py", config, *data, "--pretrained", work / "latest.pth", "--work-dir", tmp_path / "runs/tuned"
    )
    assert done.returncode == 0, done.stderr
    tuned = results(tmp_path / "runs/tuned")
    assert tuned["task"] == "shortfall" and tuned["method"] == "Guess" and 0 <= tuned["metrics"]["shortfall"] <= 100
    assert tuned["backbone"] == "ViT, 2 blocks of 32 channels" and tuned["pretrain_epochs"] == 2
    done = run(
        mine, "test.py", config, tmp_path / "runs/tuned/latest.pth", *data, "--work-dir", tmp_path / "runs/tested"
    )
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "runs/tested")["metrics"] == tuned["metrics"]

    # Table and report need no module of the user's: results.json says what its figures are.
    done = tool("results_table.py", tmp_path / "runs", "--format", "csv")
    assert done.returncode == 0 and "shortfall of top-1" in done.stdout and "Guess" in done.stdout, done.stderr
    done = tool("report.py", tmp_path / "runs", "--out", tmp_path / "report.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "shortfall of top-1" in page and f"{tuned['metrics']['shortfall']:.2f}" in page

    line = ["--scale", "study", "--cifar", labelled, "--methods", "guess", "--only", "pretrain", "knn", "--dry-run"]
    done = run(mine, "reproduce.py", *line, "--import", "mine.guess", "--work-dir", tmp_path / "w")
    assert done.returncode == 0 and str(mine / "pretrain.py") in done.stdout, done.stderr

    picture = ["reconstruction", work / "latest.pth", next(labelled.glob("val/*/*.jpg")), "--out", tmp_path / "a.png"]
    one_line(run(mine, "visualize.py", *picture), "not pretraining by SemAIM or MAE or SimMIM")
    done = run(mine, "visualize.py", *picture, "--import", "mine.guess")
    assert done.returncode == 0 and (tmp_path / "a.png").is_file(), done.stderr


def test_a_misspelt_key_of_ones_own_method_is_an_error_too(mine, labelled, tmp_path):
    line = [mine / "pretrain.py", "--data-root", labelled / "train", "--work-dir", tmp_path / "w"]
    done = run(mine, "train.py", *line, "--cfg-options", "model.network.shore=0.5")
    one_line(done, "unknown config key model.network.shore: did you mean share?")
    one_line(run(mine, "train.py", *line, "--cfg-options", "task=shortfal"), "task is 'shortfal'")


def test_a_module_that_cannot_be_imported_is_one_line(mine, labelled, tmp_path):
    (tmp_path / "lost.py").write_text((mine / "pretrain.py").read_text().replace("mine.guess", "mine.gone"))
    one_line(run(mine, "train.py", tmp_path / "lost.py", "--work-dir", tmp_path / "w"), "mine.gone")


@pytest.mark.slow
def test_a_checkpoint_imports_nothing(mine, labelled, tmp_path):
    """Its config names modules; only the user's config and command line import them."""
    work = tmp_path / "guess"
    run(mine, "train.py", mine / "pretrain.py", "--data-root", labelled / "train", "--work-dir", work)
    done = run(mine, "checkpoint.py", "inspect", work / "latest.pth")
    assert done.returncode == 0 and "dialect         semaim" in done.stdout
    sys.path.insert(0, str(mine))
    try:
        from semaim import checkpoints

        checkpoints.read(work / "latest.pth")
        assert "mine" not in sys.modules
        importlib.import_module("mine.guess")
        assert "Guess" in methods() and "guess" in variants()
    finally:
        sys.path.remove(str(mine))
        from semaim.registry import METHODS

        METHODS.module_dict.pop("Guess", None)
        for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
            del sys.modules[name]


def test_every_task_and_method_keeps_its_contract():
    found = tasks()
    assert [task.name for task in found] == list(dict.fromkeys(task.name for task in found))
    assert len({task.title for task in found}) == len(found) == len(TASKS.module_dict)
    for task in found:
        assert issubclass(task, Task) and task_titled(task.title).name == task.name
        assert all(metric.label and metric.unit for metric in task.metrics.values())
        for path in task.configs.values():
            from semaim.engine.config import load_config

            cfg = load_config(ROOT / path)
            assert task_of(cfg).name == task.name
            for key in task.roots:
                assert cfg.get(key.partition(".")[0]) is not None, key
    for name, method in methods().items():
        assert issubclass(method, Method) and method.picture in ("order", "reconstruction"), name
        for variant in method.variants.values():
            for by_scale in variant.configs.values():
                assert all((ROOT / path).is_file() for path in by_scale.values())


def test_configs_of_older_checkpoints_are_known_by_what_they_build():
    """Before configs had a `task`: the method of what a checkpoint was made by is still recorded."""
    from semaim.engine.config import load_config

    for path in sorted([*ROOT.glob("semaim/configs/[a-z]*/*.py"), *ROOT.glob("mm*_configs/*.py")]):
        cfg = load_config(path, check=False).to_dict()
        task = task_of(cfg)
        del cfg["task"]
        # A task without `matches` is newer than the key: no checkpoint lacks it.
        assert type(task).matches is Task.matches or type(task_of(cfg)) is type(task), path
