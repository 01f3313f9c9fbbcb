"""The suite as a wheel, outside of any checkout: the command, the configs by name, a run from images to the table."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from commands import OLD_SETUPTOOLS, flags, losses, results

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("semaim/configs", "mmdet_configs", "mmseg_configs")
NETWORK = {
    "model.network.img_size": 32,
    "model.network.embed_dim": 32,
    "model.network.num_heads": 2,
    "model.network.depth": 2,
}
TINY = {
    **NETWORK,
    "total_batch_size": 8,
    "num_workers": 0,
    "train_cfg.max_epochs": 1,
    "param_scheduler.warmup": 0.5,
    "default_hooks.logger.interval": 1,
    "log_processor.window_size": 1,
    "default_hooks.pictures.interval": 0,
}


def run(*command, **options):
    """A command outside of the checkout, without what this process was given to find the checkout."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, env=env, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the files that git knows or would take, for nothing to be built in the checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout of git: runs where git names the files")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    folder = tmp_path_factory.mktemp("tree")
    for name in listed:
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for name in ("LICENSE", "NOTICE"):
        if not (folder / name).exists():
            (folder / name).write_text(f"{name} of a test\n")
    return folder


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    """The wheel of that copy."""
    pytest.importorskip("setuptools", "77.0.3", reason=OLD_SETUPTOOLS)
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, tree, cwd=out)
    (found,) = out.glob("semaim-*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder of commands of a fresh environment that has the wheel and sees the packages of this one."""
    venv = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv)
    python = venv / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "install", "-q", "--no-deps", "--no-index", wheel, cwd=venv)
    # After the install, which must not see what else is there, a checkout's semaim among it.
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=venv).strip())
    assert own.is_relative_to(venv)
    (own / "others.pth").write_text("\n".join(dict.fromkeys(map(sysconfig.get_path, ("purelib", "platlib")))) + "\n")
    return venv / "bin"


def test_the_wheel_holds_all_configs_data_and_licences(tree, wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for folder in FOLDERS:
            files = sorted((tree / folder).rglob("*.py"))
            assert len(files) > 10
            for file in files:
                assert archive.read(f"semaim/installed/{file.relative_to(tree)}") == file.read_bytes()
        modules = {str(file.relative_to(tree)) for file in (tree / "semaim").rglob("*") if file.suffix != ".pyc"}
        modules = {name for name in modules if not name.startswith("semaim/configs/")}
        assert {name for name in modules if (tree / name).is_file()} <= names
        assert {name.partition("/licenses/")[2] for name in names if "/licenses/" in name} >= {"LICENSE", "NOTICE"}
        assert not [name for name in names if name.startswith(("tests/", "tools/", "docs/", "mmdet_configs/"))]
        (entry,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "semaim = semaim.cli:main" in archive.read(entry).decode()


FOUND = """
import json, sys
from pathlib import Path
import semaim
from semaim.engine.config import find_config, load_config
from semaim.places import own_configs, to_install
names = sorted(own_configs())
for name in names:
    assert find_config(Path(name)).is_file()
for name in ("mmdet_configs/mae_mask_rcnn.py", "mmseg_configs/mae_upernet.py", "semaim/configs/knn/vit_base.py"):
    load_config(name, check=False)  # with the files that it is made of
print(json.dumps([semaim.__file__, names, to_install("det")]))
"""


def test_an_installed_suite_finds_its_configs_by_name(tree, installed, tmp_path):
    import json

    file, names, to_install = json.loads(run(installed / "python", "-c", FOUND, cwd=tmp_path))
    assert Path(file).is_relative_to(installed.parent)
    assert names == sorted(str(path.relative_to(tree)) for folder in FOLDERS for path in (tree / folder).rglob("*.py"))
    assert to_install == "pip install 'semaim[det]'"


@pytest.mark.slow
def test_from_images_to_the_table_by_the_installed_command(installed, tmp_path):
    semaim = installed / "semaim"
    assert run(semaim, "--version", cwd=tmp_path) == "semaim 0.1.0\n"
    run(semaim, "scenes", "scenes", "--images", 50, "--size", 32, "--level", "easy", cwd=tmp_path)
    data = ["--data-root", "scenes/classes"]
    processes = min(2, os.cpu_count() or 1)
    config = "semaim/configs/pretrain/semaim_vit_tiny_scenes.py"
    # Several processes: each is started again by the path of the installed command.
    run(semaim, "train", config, *data, "--work-dir", "w/pre", "--gpus", processes, *flags(TINY), cwd=tmp_path)
    assert len(losses(tmp_path / "w/pre")) == 5
    config = "semaim/configs/knn/vit_tiny_scenes.py"
    run(semaim, "test", config, "w/pre/latest.pth", *data, "--work-dir", "w/knn", *flags(NETWORK), cwd=tmp_path)
    measured = results(tmp_path / "w/knn")
    assert measured["config"] == "vit_tiny_scenes.py" and measured["metrics"]
    assert measured["pretrain_config"] == "semaim_vit_tiny_scenes.py" and measured["commit"] is None
    table = run(semaim, "table", "w", "--no-published", cwd=tmp_path)
    assert "k-NN" in table and "SemAIM" in table

    # The commands of the stages name what is installed, not a checkout's files.
    line = ["reproduce", "--scale", "quick", "--dry-run", "--methods", "scratch", "--only", "knn", "finetune"]
    printed = run(semaim, *line, cwd=tmp_path)
    assert " -m semaim.cli test semaim/configs/knn/vit_tiny_scenes_easy.py" in printed
    assert " -m semaim.cli train semaim/configs/finetune/vit_tiny_scenes_easy.py" in printed and "tools/" not in printed
