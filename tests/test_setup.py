"""The install: metadata, constraints, tools/setup.sh without network, tools/check_env.py, import hygiene."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import OLD_SETUPTOOLS
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it where Python lacks tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command, **options):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, **options)


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_constraints_pin_every_dependency_once_for_every_python():
    extras = PROJECT["optional-dependencies"]
    wanted = [Requirement(line) for line in sum(extras.values(), PROJECT["dependencies"])]
    for minor in range(10, 14):
        env = {"python_version": f"3.{minor}", "python_full_version": f"3.{minor}.0"}
        here = [r for r in pins() if not r.marker or r.marker.evaluate(env)]
        tested = {r.name: next(iter(r.specifier)) for r in here}
        assert len(tested) == len(here), "a package is pinned twice"
        assert all(pin.operator == "==" for pin in tested.values())
        for need in wanted:
            if need.name != "semaim":
                assert need.specifier.contains(tested[need.name].version), f"{need} on Python 3.{minor}"


SCRIPTS = [".ci/run", *sorted(f"tools/{path.name}" for path in ROOT.glob("tools/*.sh"))]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse_and_are_executable(script):
    checked = run("bash", "-n", ROOT / script)
    assert checked.returncode == 0, checked.stderr
    assert os.access(ROOT / script, os.X_OK), f"{script}: chmod +x"


def test_wheel_ships_the_configs(tmp_path):
    pytest.importorskip("setuptools", "77.0.3", reason=OLD_SETUPTOOLS)
    tree = tmp_path / "tree"
    (tree / "semaim/configs/_base_").mkdir(parents=True)
    for name in ("pyproject.toml", "setup.py", "semaim/__init__.py"):
        shutil.copy(ROOT / name, tree / name)
    (tree / "README.md").write_text("SemAIM\n")
    for name in ("pretrain.py", "_base_/runtime.py"):
        (tree / "semaim/configs" / name).write_text("lr = 1\n")
    built = run(sys.executable, "setup.py", "-q", "bdist_wheel", "-d", tmp_path, cwd=tree)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("semaim-*.whl")
    listing = run(sys.executable, "-m", "zipfile", "-l", wheel).stdout
    assert "semaim/configs/pretrain.py" in listing and "semaim/configs/_base_/runtime.py" in listing


# tools/setup.sh, on a copy of the files it reads, with an interpreter whose `-m pip` only notes its call.

PYTHON = """#!/usr/bin/env bash
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin" && : > "$3/pyvenv.cfg" && cp "$0" "$3/bin/python" ;;
    "-m pip")
        echo "${*: -1}" >> "$CALLS"
        sleep "${PIP_SECONDS:-0}"
        echo "ERROR: no wheel of torch"
        exit "${PIP:-0}" ;;
    *) exec "$REAL" "$@" ;;
esac
"""


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "tools").mkdir()
    for name in ("tools/setup.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    disk = tmp_path / "bin/df"  # the real machine may be short of the disk that a real install needs
    disk.parent.mkdir()
    disk.write_text('#!/bin/sh\necho header\necho "x x x ${FREE_KB:-99000000} x"\n')
    disk.chmod(0o755)
    return tmp_path


def setup(tree, *args, start=run, **environment):
    path = f"{tree / 'bin'}:{os.environ['PATH']}"
    names = {"PATH": path, "PYTHON": tree / "python", "REAL": sys.executable, "CALLS": tree / "calls"}
    env = {**os.environ, **names, **environment}
    return start("bash", tree / "tools/setup.sh", *args, cwd="/", env={k: str(v) for k, v in env.items()})


def calls(tree):
    file = tree / "calls"
    return file.read_text().splitlines() if file.exists() else []


def test_setup_installs_once_and_again_when_something_changed(tree):
    assert setup(tree).returncode == 0
    second = setup(tree)
    assert second.returncode == 0 and "up to date" in second.stdout
    assert calls(tree) == [".[dev]"]

    (tree / "constraints.txt").open("a").write("# changed\n")
    assert setup(tree).returncode == 0
    assert setup(tree, "--extras", "seg").returncode == 0
    assert setup(tree).returncode == 0  # asks for less than there is
    assert setup(tree, "--extras", "det").returncode == 0
    assert calls(tree) == [".[dev]", ".[dev]", ".[dev,seg]", ".[det,dev,seg]"]


def test_setup_runs_side_by_side(tree):
    if not shutil.which("flock"):
        pytest.skip("no flock command: runs on Linux with util-linux")

    def background(*command, **options):
        return subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, **options)

    both = [setup(tree, start=background, PIP_SECONDS=0.5) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert calls(tree) == [".[dev]"]


def test_setup_names_what_pip_failed_at_and_does_not_pass_for_whole(tree):
    failed = setup(tree, PIP=1)
    assert failed.returncode != 0 and len(failed.stderr.splitlines()) == 1
    assert "no wheel of torch" in failed.stderr and "setup.log" in failed.stderr
    assert setup(tree).returncode == 0
    assert len(calls(tree)) == 2

    (tree / "constraints.txt").open("a").write("# changed\n")
    assert setup(tree, PIP=1).returncode != 0
    assert setup(tree).returncode == 0
    assert len(calls(tree)) == 4


@pytest.mark.parametrize(
    "args, environment, words",
    [
        ([], {"PYTHON": "python9"}, "no Python 3.10 to 3.13"),
        ([], {"FREE_KB": "2000000"}, "1 GB of free disk space"),
        (["--extras", "tpu"], {}, "no extra 'tpu'"),
        (["--venv"], {}, "--venv needs a folder"),
        (["--venv", "tools"], {}, "is no virtual environment"),
        (["now"], {}, "unknown argument 'now'"),
    ],
)
def test_setup_says_in_one_line_what_is_missing(tree, args, environment, words):
    if args[1:] == ["tools"]:
        args = ["--venv", tree / "tools"]
    failed = setup(tree, *args, **environment)
    assert failed.returncode != 0 and words in failed.stderr
    assert len(failed.stderr.splitlines()) == 1 and not failed.stdout
    assert calls(tree) == []


@pytest.mark.slow
def test_check_env_finds_this_environment_working():
    checked = run(sys.executable, ROOT / "tools/check_env.py", cwd="/")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    for part in ("Python", "torch", "torchvision", "timm", "mmengine", "libraries", "semaim"):
        assert re.search(rf"^{part} .* ok$", checked.stdout, re.M), f"{part}:\n{checked.stdout}"
    for part in ("GPUs", "processes", "OpenMoji font", "mmcv", "mmdet", "mmsegmentation", "tested set"):
        assert re.search(rf"^{part} ", checked.stdout, re.M), part
    assert len(checked.stdout.splitlines()) <= 24, "one screen"


def test_check_env_says_what_to_do_about_broken_parts(tmp_path):
    (tmp_path / "timm.py").write_text("raise ImportError('half of timm is gone')")
    (tmp_path / "mmengine.py").write_text("import os; os.abort()")  # as a library for another CPU would
    broken = run(sys.executable, ROOT / "tools/check_env.py", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert broken.returncode == 1 and not broken.stderr
    lines = {line.split()[0]: line for line in broken.stdout.splitlines() if line}
    assert re.search("problem .*half of timm is gone: run tools/setup.sh", lines["timm"])
    assert re.search("problem .*crashed .*run tools/setup.sh", lines["mmengine"])
    assert "cannot run here: timm, mmengine" in broken.stdout


def test_check_env_needs_nothing_installed():
    # -S leaves site-packages out: no torch, no rich.
    bare = run(sys.executable, "-S", ROOT / "tools/check_env.py", "--child")
    assert bare.returncode == 0, bare.stderr
    assert '["torch", "", "missing", "no module torch: run tools/setup.sh"]' in bare.stdout


#: Arguments with which each tool would start its work; check_env needs nothing.
STARTS = {
    "benchmark": "startup", "browse": "c.py --out x.png", "check_parity": "FOLDER", "check_tags": "x",
    "checkpoint": "inspect x.pth", "convert_labels": "values a b 255=1", "features": "x.pth x.jpg --out x.npy",
    "predict": "c.py x.pth x.jpg --out preds", "report": "DIR --out x.html",
    "reproduce": "--scale quick --dry-run", "results_table": "DIR",
    "shrink": "a b --side 32", "sweep": "c.py --lr 1 --iters 1", "test": "c.py x.pth", "train": "c.py",
    "verify_dataset": "coco DIR", "visualize": "curve DIR --out x.png",
}  # fmt: skip


def test_every_tool_says_outside_of_the_environment_what_to_activate(tmp_path):
    # -S -E leave out site-packages and PYTHONPATH, as the system's Python would: neither torch nor this package.
    bare = [sys.executable, "-S", "-E"]
    assert {path.stem for path in (ROOT / "tools").glob("*.py")} <= {*STARTS, "check_env"}
    if not (ROOT / ".venv").is_dir():
        pytest.skip("no .venv in this checkout: runs after tools/setup.sh")
    for name, words in STARTS.items():
        failed = run(*bare, ROOT / f"tools/{name}.py", *words.split(), cwd=tmp_path)
        message = f"has no torch: activate the environment: source {ROOT}/.venv/bin/activate\n"
        assert failed.returncode == 2 and failed.stderr.startswith("error: "), name + failed.stderr
        assert failed.stderr.endswith(message) and failed.stderr.count("\n") == 1, name + failed.stderr
        assert run(*bare, ROOT / f"tools/{name}.py", "--help", cwd=tmp_path).returncode == 0, name
    assert not list(tmp_path.iterdir())


def test_without_an_environment_the_setup_is_named(tmp_path):
    for folder in ("semaim", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    failed = run(sys.executable, "-S", "-E", "tools/train.py", "c.py", cwd=tmp_path)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert failed.stderr.endswith("no torch: run tools/setup.sh, then source .venv/bin/activate\n"), failed.stderr
    (tmp_path / "tools/train.py").unlink()  # as from a wheel
    failed = run(sys.executable, "-S", "-E", "-m", "semaim.cli", "train", "c.py", cwd=tmp_path)
    assert failed.returncode == 2 and failed.stderr.endswith("with its requirements: pip install semaim\n")


def test_a_module_that_is_missing_within_the_environment_is_no_user_error():
    from semaim.errors import run as run_command

    def main():
        raise ModuleNotFoundError("no module named mine", name="mine")

    with pytest.raises(ModuleNotFoundError, match="mine"):
        run_command(main)


def test_importing_semaim_brings_in_no_mm_package():
    code = """
import importlib, pathlib, sys, semaim
root = pathlib.Path(semaim.__file__).parent
for path in sorted(root.rglob("*.py")):
    parts = path.relative_to(root.parent).with_suffix("").parts
    if parts[1] not in ("detection", "segmentation", "configs") and parts[-1] not in ("__main__", "__init__"):
        importlib.import_module(".".join(parts))
print(sorted(name for name in ("mmdet", "mmseg", "mmcv") if name in sys.modules))
"""
    imported = run(sys.executable, "-c", code, cwd=ROOT)
    assert imported.returncode == 0, imported.stderr
    assert imported.stdout.splitlines()[-1] == "[]"
