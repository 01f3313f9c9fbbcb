"""Fixtures of all tests."""

import importlib.util
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yapf  # noqa: F401
from hypothesis import settings

# yapf (mmengine prints configs with it) caches its grammar on the first import ever, and shows the file under its name
# before all of it is written. Imported here, in the process that starts the test workers: none reads half a file.

ROOT = Path(__file__).resolve().parent.parent

# A shell starts what runs in its background with Ctrl-C ignored, nohup with SIGHUP, and so would be all that a test
# starts. Tests send them.
for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, default)

# The same examples in every run, and none fails for being slow on a busy machine.
settings.register_profile("semaim", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("semaim")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the recorded results of the reference implementations."""
    path = ROOT / os.environ.get("SEMAIM_SHARED", "../shared")
    if not (path / "golden").is_dir():
        pytest.skip(f"no recorded results at {path}: runs where SEMAIM_SHARED names the folder that holds golden/")
    return path


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """Class folders of 40 training and 10 validation scenes of 32 pixels."""
    from semaim.data.scenes import write_scenes

    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, 50, 32, seed=0)
    return folder / "classes"


@pytest.fixture(scope="session")
def labelled(scenes, tmp_path_factory) -> Path:
    """The same scenes in five classes, each in both splits: 40 to train on, 10 to validate."""
    folder = tmp_path_factory.mktemp("labelled")
    names = sorted(path.name for path in (scenes / "train").iterdir())
    images: dict[str, list[Path]] = {}
    for path in sorted(scenes.rglob("*.jpg")):
        images.setdefault(names[names.index(path.parent.name) % 5], []).append(path)
    for name, paths in images.items():
        for split, chosen in (("val", paths[:2]), ("train", paths[2:])):
            (folder / split / name).mkdir(parents=True)
            for path in chosen:
                (folder / split / name / f"{path.parent.parent.name}_{path.name}").symlink_to(path)
    return folder


@pytest.fixture
def one_thread():
    """For networks so small that threads cost more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_config(scenes, tmp_path):
    """A function that makes a pretraining config small enough for a second; keywords are `--cfg-options`."""
    from semaim.engine.config import load_config

    def make(work_dir: str = "run", **options):
        cfg = load_config(
            ROOT / "semaim/configs/pretrain/semaim_vit_tiny_scenes.py",
            {
                "dataset.root": str(scenes),
                "model.network.img_size": 32,
                "model.network.embed_dim": 32,
                "model.network.num_heads": 2,
                "model.network.depth": 2,
                "total_batch_size": 8,
                "base_lr": 0.032,  # peak 1e-3
                "num_workers": 0,
                "train_cfg.max_epochs": 2,
                "param_scheduler.warmup": 0.5,
                "default_hooks.logger.interval": 1,
                "default_hooks.pictures.interval": 0,
                "default_hooks.checkpoint.interval": 1,
                "log_processor.window_size": 1,
                **options,
            },
        )
        cfg.work_dir = str(tmp_path / work_dir)
        return cfg

    return make


@pytest.fixture
def here(monkeypatch, capsys):
    """A tool in this process, which saves the seconds of imports."""
    from semaim.errors import run

    def start(name, *arguments):
        spec = importlib.util.spec_from_file_location(f"tools_{name[:-3]}", ROOT / "tools" / name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        status = run(module.main)
        done = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=done.out, stderr=done.err)

    return start


@pytest.fixture(scope="session")
def pretrained(scenes, tmp_path_factory) -> Path:
    """A checkpoint of a network of width 32 and two blocks, after an epoch on the scenes."""
    from semaim.engine.config import load_config
    from semaim.engine.training import train

    cfg = load_config(
        ROOT / "semaim/configs/pretrain/semaim_vit_tiny_scenes.py",
        {
            "dataset.root": str(scenes),
            "model.network.img_size": 32,
            "model.network.embed_dim": 32,
            "model.network.num_heads": 2,
            "model.network.depth": 2,
            "total_batch_size": 8,
            "num_workers": 0,
            "train_cfg.max_epochs": 1,
            "param_scheduler.warmup": 0.5,
            "default_hooks.pictures.interval": 0,
        },
    )
    cfg.work_dir = str(tmp_path_factory.mktemp("pretrained"))
    train(cfg)
    return Path(cfg.work_dir) / "epoch_1.pth"
